"""Sites: the modules that take the place of a model's own, which modules can be one, and how bases are told apart."""
