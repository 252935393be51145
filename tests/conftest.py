"""The files that take longest come first, so that two processes end at about the same time."""

import pytest

LONG = ("jobs/test_pipeline.py", "idm/test_model.py", "jobs/test_launchers.py", "stages/test_plan.py",
        "jobs/test_robot_recipe.py", "policies/test_benchmark.py", "stages/test_train_policy_more.py",
        "engine/test_processes.py", "jobs/test_command.py", "conf/test_compose.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(LONG)))
