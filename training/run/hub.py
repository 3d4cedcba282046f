"""Upload of a run's result to the hub."""

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

# What huggingface_hub raises: OSError (permission, disk), ValueError (name), RuntimeError (large-file transfer),
# HTTPError (network)
HUB_ERRORS = (OSError, ValueError, RuntimeError, HTTPError)
# Nothing else is ever uploaded: no args.json, which may name local paths, no checkpoints, logs or optimizer states
UPLOADED = (
    CARD_NAME, LOSS_NAME, "pytorch_lora_weights*.safetensors", f"{SUBFOLDER}/*", "samples/*.mp4", "samples/*.txt",
)  # fmt: skip
MAX_NAME_LENGTH = 96  # characters of a repository's name: the hub's limit


def check_hub(args, accelerator) -> str | None:
    """The repository to upload to, created if it does not exist; UsageError now, not after training, if that fails.

    None without --push_to_hub, when nothing accesses the network, and on the other processes.
    """
    if not args.push_to_hub:
        return None
    repo = on_main_process(accelerator, lambda: make_repo(args))
    return repo if accelerator.is_main_process else None


def make_repo(args) -> str:
    """Create the repository if needed and check that this user may write to it; returns its full name."""
    api = HfApi(token=args.hub_token)
    wanted = args.hub_model_id or default_repo_name(Path(args.output_dir).resolve().name)
    try:
        repo = wanted if "/" in wanted else f"{api.whoami()['name']}/{wanted}"
        api.create_repo(repo, private=not args.hub_public, exist_ok=True)
        api.auth_check(repo, write=True)  # it may exist and be someone else's, or the token may be read-only
    except HUB_ERRORS as error:
        raise UsageError(
            f"--push_to_hub: {wanted} cannot be written ({first_line(error)}); log in with `hf auth login`, set "
            "HF_TOKEN to a token that may write, or leave the flag out and upload later"
        ) from error
    logger.info("the result will be uploaded to https://huggingface.co/%s", repo)
    return repo


def default_repo_name(folder: str) -> str:
    """A valid repository name from the folder's: at most 96 letters, digits, - _ and ., without -- or ..

    If it had to be altered, it ends in a hash of the folder's, so that two folders never share a repository.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder)
    name = re.sub(r"--+", "-", re.sub(r"\.\.+", ".", name)).removesuffix(".git").strip("-._")
    if name == folder and len(name) <= MAX_NAME_LENGTH:
        return name
    digest = short_hash(folder)
    begin = name[: MAX_NAME_LENGTH - len(digest) - 1].rstrip("-._")
    return f"{begin or 'cogvideox-finetune'}-{digest}"


def push(args, repo: str) -> None:
    """Upload the files on the list; if that fails, StorageError with the command to do it by hand."""
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
    """The command for the same upload."""
    includes = [word for pattern in UPLOADED for word in ("--include", pattern)]
    return shlex.join(["hf", "upload", repo, str(output_dir), ".", *includes])
