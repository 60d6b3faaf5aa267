"""The examples of deployment are what Ray reads: its own schema takes them, and its builder makes the application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray.serve")

from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built
from ray.serve.schema import ServeDeploySchema

from reparam.serve.ray import application

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"


def of_serve() -> Any:
    return yaml.safe_load((DEPLOY / "serve.yaml").read_text())


def of_kuberay() -> Any:
    found = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    assert found["kind"] == "RayService"
    return yaml.safe_load(found["spec"]["serveConfigV2"])


@pytest.mark.parametrize("read", [of_serve, of_kuberay])
def test_ray_reads_the_examples(read: Any, tmp_path: Path) -> None:
    (app,) = ServeDeploySchema(**read()).applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-many-letters-0123456789\n")
    keys.chmod(0o600)
    made = built(application, {**app.args, "api_key_file": str(keys)})
    engines = made._bound_deployment.init_args[0]._bound_deployment
    scaling = engines._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    assert scaling.target_ongoing_requests == 32


def test_a_wrong_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="replica_count"):
        built(application, {"base": "/models/base", "local": True, "replica_count": 2})
