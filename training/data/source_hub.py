"""Whether the hub answers, found out within seconds; the library that fetches data sets tries for longer."""

from __future__ import annotations

from controlkit.hub import CONNECT_SECONDS, briefly, first_sentence


def check_hub(repo_id: str) -> None:
    """Ask the hub about a data set; where its network is switched off, the library looks into its cache.

    Raises ValueError, one line within 5 seconds: it cannot be reached, or knows no such data set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    answer = briefly(lambda: _ask(repo_id))
    if answer is None:
        answer = "nothing is known: the hub does not answer"
    if answer:
        raise ValueError(
            f"there is no folder {repo_id}, and of a data set of that name {answer}; if it was fetched "
            "before, HF_HUB_OFFLINE=1 takes it from the cache"
        )


def _ask(repo_id: str) -> str:
    """Why the hub does not give a data set, in words; "" if it does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

    try:
        HfApi().dataset_info(repo_id, timeout=CONNECT_SECONDS)
    except GatedRepoError:
        return "the hub wants its terms accepted and a login first (hf auth login)"
    except RepositoryNotFoundError:
        return "the hub does not know (or it is private: hf auth login)"
    except HfHubHTTPError as error:
        return f"the hub says: {first_sentence(error)}"
    except (OSError, NetworkError):
        return "nothing is known: the hub cannot be reached (no network?)"
    return ""
