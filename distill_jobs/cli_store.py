"""The verbs of ``distill store``. Like all verbs they import what they need last."""

from typing import Annotated, Literal

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
    """Check everything a store promises; name each violation and exit with 1 if there is one.

    The data and the teacher beside the store are asked where they are there.
    """
    from cluster.files import Folder
    from distill_jobs.models.files import SERVING
    from distill_jobs.store.plan import StorePlan, workdir_of
    from distill_jobs.store.reader import read_manifest
    from distill_jobs.store.verify import verify

    folder = Folder(path)
    data, teacher = workdir_of(folder) / "data", workdir_of(folder) / "teacher" / "model"
    with_data = data.exists("manifest.json")
    violations = verify(folder, data if with_data else None, teacher if teacher.exists(SERVING) else None)
    for violation in violations:
        typer.echo(violation)
    if violations:
        typer.echo(f"{len(violations)} violations in {path}; `distill store repair {path}` sets damaged parts aside")
        raise typer.Exit(1)
    manifest = read_manifest(folder, StorePlan.load(folder))
    held, out = manifest["rows"], manifest["quarantined"]
    against = "the data beside it" if with_data else "the ids' own ranges (no data beside it)"
    typer.echo(f"{path} is whole, by {against}: of {held + out:,} rows {held:,} are there once, {out:,} in quarantine")
    typer.echo("checksums, commit records, values, masses and fingerprints are right")


@store.command("repair")
def repair_store(
    path: Path,
) -> None:
    """Set damaged parts aside, so that the next `distill capture` makes them, and only them, again."""
    from cluster.files import Folder
    from distill_jobs.stage import RECORD
    from distill_jobs.store.plan import StorePlan
    from distill_jobs.store.reader import read_manifest
    from distill_jobs.store.repair import repair

    folder = Folder(path)
    if not folder.exists("parts/part-00000.json") and not folder.exists("plan.json"):
        StorePlan.load(folder)
    parts = repair(folder)
    if folder.exists("manifest.json"):
        read_manifest(folder, StorePlan.load(folder))
        typer.echo(f"every file in {path} is as it was written: there is nothing to repair")
        return
    folder.remove(RECORD)
    few = ", ".join(map(str, parts[:8])) + (", ..." if parts[8:] else "")
    told = f"{len(parts)} damaged parts are set aside ({few})" if parts else "no part is damaged"
    typer.echo(f"{told}; the store in {path} is incomplete now: run `distill capture SPEC` to complete it")


@store.command("fidelity")
def measure_fidelity(
    path: Path,
    student: Annotated[
        str | None, typer.Option(help="A trained student's model folder; by default the workdir's first.")
    ] = None,
    positions: Annotated[int, typer.Option(min=1, help="Held-back positions to measure at.")] = 512,
) -> None:
    """Measure what the codec keeps of the teacher, beside other sizes and other ways to store one.

    Needs the teacher and the data beside the store; without them it prints what was measured at capture.
    """
    from cluster.files import Folder
    from distill_jobs.report.fidelity import picture
    from distill_jobs.report.fidelity_text import print_page
    from distill_jobs.store.fidelity.beside import fidelity_of

    def measured(done: int) -> None:
        typer.echo(f"\r{done:,} of {positions:,} positions", err=True, nl=done >= positions)

    folder = Folder(path)
    page, new = fidelity_of(folder, positions, Folder(student) if student else None, measured)
    print_page(page)
    if new:
        folder.write("fidelity.png", picture(page))
        typer.echo(f"written: {path}/fidelity.json, and the curve of bytes against error as {path}/fidelity.png")
    else:
        typer.echo("measured at capture: the teacher and the data are not beside the store, so nothing was done again")


@store.command("archive")
def archive_store(
    path: Path,
) -> None:
    """Compress a store's parts for keeping; the store can't be read until it is restored."""
    from cluster.files import Folder
    from distill_jobs.store.archive import archive
    from distill_jobs.words import size

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
    from distill_jobs.store.archive import restore
    from distill_jobs.words import size

    sizes = restore(Folder(path), _counted)
    if not sizes.cold:
        typer.echo(f"{path} is not archived: there is nothing to restore")
    else:
        typer.echo(f"{path} is back: {size(sizes.cold)} became {size(sizes.hot)} again")


@store.command("export")
def export_to(
    path: Path,
    to: Annotated[str, typer.Option(help="The folder to make: on disk, or s3://...")],
    form: Annotated[
        Literal["parquet", "datasets"],
        typer.Option("--format", help="Parquet files, or a folder for datasets.load_from_disk."),
    ] = "parquet",
) -> None:
    """Write a store out, soft targets decoded, for other tools to read."""
    from cluster.files import Folder
    from distill_jobs.store.exchange.export import export_store
    from distill_jobs.store.plan import workdir_of
    from distill_jobs.words import size

    data = workdir_of(Folder(path)) / "data"
    index = export_store(Folder(path), Folder(to), form, data if data.exists("manifest.json") else None, _counted)
    typer.echo(f"{to} holds {index['rows']:,} rows in {len(index['files']):,} shards, {size(index['bytes'])}")


@store.command("import")
def import_from(
    source: Annotated[str, typer.Argument(help="A Parquet file, or a folder of them.")],
    into: Annotated[str, typer.Option(help="The store's folder to make, go on with, or add to.")],
    tokenizer: Annotated[str, typer.Option(help="The teacher's tokenizer: a folder, a GGUF file, or bytes.")],
    form: Annotated[
        Literal["topk", "distillkit"],
        typer.Option("--format", help="Plain lists of entries, or DistillKit's captures."),
    ] = "topk",
    tokens: Annotated[str, typer.Option("--tokens-column", help="The column of token ids.")] = "input_ids",
    ids: Annotated[str | None, typer.Option("--ids-column", help="The column of listed classes.")] = None,
    values: Annotated[str | None, typer.Option("--values-column", help="The column of their values.")] = None,
    kind: Annotated[
        Literal["logprobs", "logits", "probs"],
        typer.Option("--values", help="What the values are, in nats."),
    ] = "logprobs",
    align: Annotated[
        Literal["next", "same"], typer.Option(help="Whether entry t foretells token t+1, or is about token t.")
    ] = "next",
    k: Annotated[int | None, typer.Option(min=1, max=4096, help="Entries to keep; else as many as are listed.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, max=1 << 20, help="Tokens in a sequence; else those of the longest row.")
    ] = None,
    padded: Annotated[int | None, typer.Option(min=1, help="Width of the teacher's logits with their padding.")] = None,
    config: Annotated[str | None, typer.Option(help="DistillKit's compression configuration.")] = None,
    teacher: Annotated[str, typer.Option(help="A name for the teacher.")] = "unknown",
) -> None:
    """Make a store of what another tool captured; see EXCHANGE.md for what is assumed of it."""
    from cluster.files import Folder
    from distill_jobs.store.exchange.filling import Layout
    from distill_jobs.store.exchange.importing import import_store
    from distill_jobs.words import size

    layout = Layout(form, tokens, ids, values, kind, align, k, length, padded, config, teacher)
    made = import_store(source, Folder(into), tokenizer, layout, _counted)
    typer.echo(f"{into} holds {made['rows']:,} rows, {made['tokens']:,} tokens, {size(made['bytes'])}")


def _counted(done: int, of: int) -> None:
    typer.echo(f"\r{done:,} of {of:,} parts", err=True, nl=done == of)
