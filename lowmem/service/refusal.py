"""Says why a request is not admitted, in the shape of OpenAI's errors."""

from __future__ import annotations

import json

_TYPES = {408: "timeout_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """Raised for a request that is not admitted.

    `status` is the HTTP status, and `param` names the field that the client has to change.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str = "invalid"
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code

    def body(self) -> bytes:
        """Return the JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def over(name: str, value: object, limit: int, what: str) -> Refusal:
    """Build the refusal of a value above its limit; `value` is a number, or a number with its unit."""
    shown = str(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of many digits"
    said = f"{name[:80]}={shown}" if isinstance(value, int) else f"{name[:80]} has {shown}"
    return Refusal(
        f"{said}, more than the limit of {limit} ({what}); lower it", name[:80], code="limit_exceeded"
    )
