"""Data sets of the hub, with the real code of `datasets` and huggingface_hub, from a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server

# Both libraries read their settings once, when they are imported.
PROGRAM = """
import json
from reparam.data.rows import Reading

def prompts(name, **how):
    try:
        return [row.prompt for row in Reading([name], **how)]
    except ValueError as error:
        return str(error)

loaded = prompts("user/set@v1:test")
streamed = prompts("user/set", streaming=True)
print(json.dumps([loaded, streamed, prompts("user/set:none"), prompts("user/set@v9")]))
"""


def test_revisions_splits_and_streaming(tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub_server.start(),
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, streamed, no_split, no_revision = json.loads(done.stdout.splitlines()[-1])
    assert loaded == [f"v1 test {i}" for i in range(3)]
    assert streamed == [f"main train {i}" for i in range(3)]
    assert "['train', 'test']" in no_split
    assert "user/set@v9: " in no_revision
    assert "v9" in no_revision.removeprefix("user/set@v9")
