"""Tests of the device cuda are marked gpu. What is marked gpu is skipped, with the reason, where it cannot run."""

import pytest


def _why_no_gpu() -> str | None:
    import torch

    from pykd._extension import load

    built = load()
    if not built.cuda:
        return f"pykd is built without CUDA: {built.cuda_reason}"
    return None if torch.cuda.is_available() else "no CUDA device"


@pytest.hookimpl(tryfirst=True)  # before pytest -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and callspec.params.get("device") == "cuda":
            item.add_marker("gpu")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
