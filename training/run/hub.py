"""The upload of a run's result."""

import logging
import re
import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of httpx, or since its version 2 of httpx2

from base.errors import StorageError, UsageError, first_line
from base.hashes import short_hash
from base.ranks import on_main_process
from engine.sft import SUBFOLDER
from run.model_card import CARD_NAME, LOSS_NAME


logger = logging.getLogger(__name__)

# Of the client: refusals and disks, names that are none, its own transfer of large files, the line
HUB_ERRORS = (OSError, ValueError, RuntimeError, HTTPError)
# All that is ever uploaded: no args.json, which may name local paths, no checkpoints, logs or optimizer states
UPLOADED = (
    CARD_NAME, LOSS_NAME, "pytorch_lora_weights*.safetensors", f"{SUBFOLDER}/*", "samples/*.mp4", "samples/*.txt",
)  # fmt: skip
MAX_NAME_LENGTH = 96  # characters of a repository's name that the hub takes


def check_hub(args, accelerator) -> str | None:
    """The repository to upload to, made if it is not there; UsageError now, not after training, if it cannot be.

    Without --push_to_hub, and on the other processes, None, and nothing asks the network.
    """
    if not args.push_to_hub:
        return None
    repo = on_main_process(accelerator, lambda: make_repo(args))
    return repo if accelerator.is_main_process else None


def make_repo(args) -> str:
    """The repository's whole name; it is there, and this user may write it."""
    api = HfApi(token=args.hub_token)
    wanted = args.hub_model_id or default_repo_name(Path(args.output_dir).resolve().name)
    try:
        repo = wanted if "/" in wanted else f"{api.whoami()['name']}/{wanted}"
        api.create_repo(repo, private=not args.hub_public, exist_ok=True)
        api.auth_check(repo, write=True)  # an existing one may be another's, or the token for reading only
    except HUB_ERRORS as error:
        raise UsageError(
            f"--push_to_hub: {wanted} cannot be written ({first_line(error)}); log in with `hf auth login`, set "
            "HF_TOKEN to a token that may write, or leave the flag out and upload later"
        ) from error
    logger.info("the result will be uploaded to https://huggingface.co/%s", repo)
    return repo


def default_repo_name(folder: str) -> str:
    """A name that the hub takes: at most 96 letters, digits, - _ and ., no -- or .. in it.

    One that had to be altered ends in a hash of the whole, so that two folders are never one repository.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder)
    name = re.sub(r"--+", "-", re.sub(r"\.\.+", ".", name)).removesuffix(".git").strip("-._")
    if name == folder and len(name) <= MAX_NAME_LENGTH:
        return name
    digest = short_hash(folder)
    begin = name[: MAX_NAME_LENGTH - len(digest) - 1].rstrip("-._")
    return f"{begin or 'cogvideox-finetune'}-{digest}"


def push(args, repo: str) -> None:
    """Upload what is on the list; StorageError, with the command to do it by hand, if that fails."""
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo,
            folder_path=args.output_dir,
            allow_patterns=list(UPLOADED),
            commit_message="Upload the result of training",
        )
    except HUB_ERRORS as error:
        raise StorageError(
            f"the run is complete and kept in {args.output_dir}, but its upload failed ({first_line(error)}); run the "
            f"same command again, or: {upload_command(repo, args.output_dir)}"
        ) from error
    logger.info("uploaded to https://huggingface.co/%s", repo)


def upload_command(repo: str, output_dir: str) -> str:
    """The same upload by hand."""
    includes = [word for pattern in UPLOADED for word in ("--include", pattern)]
    return shlex.join(["hf", "upload", repo, str(output_dir), ".", *includes])
