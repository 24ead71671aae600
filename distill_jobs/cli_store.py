"""The verbs of ``distill store``. Like all verbs they import what they need last."""

from typing import Annotated

import typer

store = typer.Typer(help="Look into a logit store, check it, or carry it elsewhere.", no_args_is_help=True)

Path = Annotated[str, typer.Argument(help="The store's folder, for example runs/adult/store.")]


@store.command("inspect")
def inspect_store(
    path: Path,
    samples: Annotated[int, typer.Option(min=0, help="How many positions to show decoded.")] = 3,
) -> None:
    """Tell what is in a store: teacher, data, codec, sizes, mass kept, a few decoded positions."""
    from cluster.files import Folder
    from distill_jobs.store.inspect import describe, render

    typer.echo(render(describe(Folder(path), samples)))


@store.command("verify")
def verify_store(
    path: Path,
) -> None:
    """Check everything a store promises; name each violation and exit with 1 if there is one."""
    from cluster.files import Folder
    from distill_jobs.store.verify import verify

    data = Folder(f"{path.rstrip('/')}/../data")
    violations = verify(Folder(path), data if data.exists("manifest.json") else None)
    for violation in violations:
        typer.echo(violation)
    if violations:
        typer.echo(f"{len(violations)} violations in {path}")
        raise typer.Exit(1)
    typer.echo(f"{path} is whole: every row there once, checksums, masses and fingerprints right")


@store.command("archive")
def archive_store(
    path: Path,
) -> None:
    """Compress a store's parts for keeping; the store can't be read until it is restored."""
    from cluster.files import Folder
    from distill_jobs.report.words import size
    from distill_jobs.store.archive import archive

    sizes = archive(Folder(path), _counted)
    typer.echo(
        f"{path} is archived: {size(sizes.hot)} became {size(sizes.cold)} ({sizes.cold / max(1, sizes.hot):.0%}); "
        f"`distill store restore {path}` turns it back"
    )


@store.command("restore")
def restore_store(
    path: Path,
) -> None:
    """Turn an archived store back, byte for byte."""
    from cluster.files import Folder
    from distill_jobs.report.words import size
    from distill_jobs.store.archive import restore

    sizes = restore(Folder(path), _counted)
    if not sizes.cold:
        typer.echo(f"{path} is not archived: there is nothing to restore")
    else:
        typer.echo(f"{path} is back: {size(sizes.cold)} became {size(sizes.hot)} again")


def _counted(done: int, of: int) -> None:
    typer.echo(f"\r{done:,} of {of:,} parts", err=True, nl=done == of)
