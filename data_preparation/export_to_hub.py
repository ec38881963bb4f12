"""Push a dataset folder to the Hub: its parquet files and its card.

    python data_preparation/export_to_hub.py FOLDER USER/NAME [--private]

Needs a token that may write, from `hf auth login` or in HF_TOKEN. The rows are checked first, as training does it.
Running it again uploads only what has changed.
"""

from pathlib import Path

from instruct_pix2pix.cli import Parser, UserError, first_line, run


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("what and where").add_argument
    add("folder", type=Path, metavar="FOLDER", help="a finished dataset folder")
    add("repo_id", metavar="REPO_ID", help="the repository on the Hub, USER/NAME; made if it is not there")
    add("--private", action="store_true", help="make the repository visible to its owner only")
    add("--revision", metavar="BRANCH", help="push to this branch, made if it is not there, instead of main")
    add("--commit_message", default="Upload dataset", metavar="TEXT", help="message of the commit")
    # fmt: on
    args = parser.parse_args(argv)
    folder = args.folder
    shards = sorted(folder.glob("data/*.parquet"))
    if not (folder / "README.md").is_file() or not shards:
        remedy = "give a folder that a build command has finished"
        raise UserError(f"FOLDER: {folder}: no finished dataset (README.md and data/*.parquet); {remedy}")

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    from instruct_pix2pix.data.sources import Source
    from instruct_pix2pix.data.triples import load_triples

    for split in sorted({shard.name.split("-")[0] for shard in shards}):
        # What training could not use is said, not uploaded.
        load_triples(Source(str(folder), "FOLDER", split=split, on_bad_row="error"))
    api = HfApi()
    try:
        repo = api.create_repo(args.repo_id, repo_type="dataset", private=args.private or None, exist_ok=True)
        if args.revision:
            api.create_branch(repo.repo_id, repo_type="dataset", branch=args.revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo.repo_id,
            repo_type="dataset",
            revision=args.revision,
            commit_message=args.commit_message,
            # The plan and unfinished parts stay here; files of an earlier build with other shard names go.
            allow_patterns=["README.md", "preview.png", "skipped.jsonl", "data/*.parquet"],
            delete_patterns=["data/*.parquet"],
        )
    except Exception as error:  # besides its own errors the client raises those of whichever HTTP library it uses
        code, remedy = getattr(getattr(error, "response", None), "status_code", None), "run the command again"
        if isinstance(error, HFValidationError):
            remedy = "give USER/NAME"
        elif isinstance(error, LocalTokenNotFoundError) or code in (401, 403):
            remedy = "log in with a token that may write"
        raise UserError(f"REPO_ID: {args.repo_id}: {first_line(error)}; {remedy}") from None
    size = sum(path.stat().st_size for path in shards) / 1e6
    print(f"{len(shards)} shards ({size:.1f} MB) and the card: {repo}")
    print(f"commit: {commit.commit_url}")


if __name__ == "__main__":
    run(main)
