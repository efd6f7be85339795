"""What the chosen tests will ask a fixture for, so that it can run ahead of them on all cores."""

from __future__ import annotations

from typing import Any

import pytest


def asked_for(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return the parameters of the session's tests that use the fixture of a request."""
    return [
        item.callspec.params
        for item in request.session.items
        if request.fixturename in getattr(item, "fixturenames", ())
    ]
