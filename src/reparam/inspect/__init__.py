"""Looking at what an adapter holds and what it does to the weights."""
