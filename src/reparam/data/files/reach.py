"""Whether the Hugging Face hub answers. Its libraries try for half a minute, and print each try, before giving up."""

from __future__ import annotations

SECONDS = 10.0  # for one short request

_answered = False


def unreachable() -> str:
    """Why the hub cannot be asked: it is turned off, or a short request has no answer; "" if it answers."""
    global _answered
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    if not _answered:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except Exception as error:  # those of the HTTP library, which differs between versions of huggingface_hub
            reason = " ".join(str(error).split()) or type(error).__name__
            return f"{constants.ENDPOINT} cannot be reached: {reason[:200]}"
        _answered = True
    return ""
