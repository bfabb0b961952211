"""What benchmarks/compare.py found: as a dict for JSON, and from that alone the tables for Markdown and terminal."""

from benchmarks.compare_rounds import Result, ratio

HEAD = ("arm", "parameters", "step s (min to max)", "step / ours", "pass s", "pass / ours", "call s", "images/s",
        "TFLOPs an image", "share of ceiling: conv., matmul", "kept MiB an image", "peak GB")  # fmt: skip
TARGET_HEAD = ("target", "limit", "measured", "", "how")


def summary(result: Result, reference: Result, batch_size: int, ceilings: dict[str, dict[str, float]]) -> dict:
    """An arm's raw readings (seconds) and all that follows from them."""
    row = {
        "name": result.arm.name, "text": result.arm.text, "setting": result.arm.to_dict(), "failure": result.failure,
        **result.facts, "readings": result.readings,
    }  # fmt: skip
    if result.failure or not result.readings:
        return row
    row["median"] = {name: result.median(name) for name in ("pass", "optimizer", "step", "call")}
    steps = [reading["step"] for reading in result.readings]
    row["step_range"] = [min(steps), max(steps)]
    row["images_per_second"] = batch_size / row["median"]["step"]
    if reference.failure is None:
        row["ratio_to_ours"] = {name: ratio(result, reference, name) for name in ("pass", "step", "call")}
    ceiling = ceilings.get(result.arm.dtype, {})
    row["share_of_ceiling"] = {kind: result.facts["flops_per_second"] / rate for kind, rate in ceiling.items()}
    return row


def spread(median: float, low: float, high: float) -> str:
    """Seconds, as "0.120 (0.118 to 0.131)"."""
    return f"{seconds(median)} ({seconds(low)} to {seconds(high)})"


def seconds(value: float) -> str:
    """Three digits that count, also of milliseconds."""
    return f"{value:.3g}" if value < 1 else f"{value:.2f}"


def arm_cells(row: dict) -> list[str]:
    """A row of the main table."""
    count = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "-"
    if row["failure"]:
        return [row["text"], count, f"failed: {row['failure']}"[:160], *[""] * (len(HEAD) - 3)]
    median, ratios, share = row["median"], row.get("ratio_to_ours", {}), row["share_of_ceiling"]
    kept = f"{row['kept_bytes_per_image'] / 2**20:.1f}" if "kept_bytes_per_image" in row else ""
    cold = f"; first step and call {row['first_seconds']:.0f} s" if row["setting"]["compiled"] else ""
    times = lambda name: f"{ratios[name]:.2f}" if name in ratios else ""
    return [
        row["text"] + cold, count, spread(median["step"], *row["step_range"]), times("step"), seconds(median["pass"]),
        times("pass"), seconds(median["call"]), f"{row['images_per_second']:.3g}",
        f"{row['flops_per_image'] / 1e12:.3f}",
        ", ".join(f"{share[kind]:.0%}" for kind in ("convolution", "matmul") if kind in share), kept,
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]  # fmt: skip


def target_cells(target: dict) -> list[str]:
    limit = "" if target["limit"] is None else f"{target['bound']} {target['limit']:g}"
    value = "" if target["value"] is None else f"{target['value']:.3f}"
    return [target["name"], limit, value, target["verdict"], target["text"]]


def alone_line(row: dict) -> str:
    value = row["value"]
    number = "" if value is None else f"{value:,.0f}" if value > 100 else f"{value:.3g}"
    return f"{row['what']}: {number} {row['unit']}, {row['text']}"


def header(report: dict) -> str:
    machine, settings = report["machine"], report["settings"]
    shape = settings["shape"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; PyTorch {machine['torch']}, "
        f"diffusers {machine['diffusers']}, denoising-diffusion-pytorch {machine['denoising-diffusion-pytorch']}; "
        f"{report['date']}. {settings['dtype']}, batch {shape['batch_size']}, {shape['image_size']} px, base_dim "
        f"{shape['base_dim']}, multipliers {', '.join(map(str, shape['dim_multiply']))}; medians of "
        f"{settings['rounds']} rounds in turn."
    )


NOTES = (
    "Pass: forward and backward. Step: with fused Adam. Call: no gradients. FLOPs are those of a training pass with "
    "nothing computed twice; lucidrains' network has other blocks and attention (its defaults), so other FLOPs and "
    "parameters. Heap kept: the C library does not hand freed memory back. Peak: of the process on the CPU, allocated "
    "on CUDA. Kept for backward is not counted of compiled networks. Share of ceiling: the step's FLOPs a second over "
    "those of the best convolution, or matrix product, measured alone. Where memory was short for all at once, peers "
    "took their turns in groups, ours in every group; ratios are within a group, so not quite the quotients of the "
    "columns."
)


def blocks(report: dict) -> list[str | list[list[str]]]:
    """The parts of the report in order: paragraphs, and tables by their rows of cells, the head first."""
    ceilings = [
        f"ceilings in {dtype}: " + ", ".join(f"{kind} {rate / 1e12:.3f} TFLOP/s" for kind, rate in kinds.items())
        for dtype, kinds in report["ceilings"].items()
    ]
    return [
        header(report),
        [list(HEAD), *map(arm_cells, report["arms"])],
        NOTES,
        [list(TARGET_HEAD), *map(target_cells, report["targets"])],
        "\n".join(f"- {line}" for line in [*ceilings, *map(alone_line, report["alone"])]),
    ]


def markdown(report: dict) -> str:
    """All of it, to be pasted into a README."""

    def table(rows: list[list[str]]) -> str:
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

    parts = [block if isinstance(block, str) else table(block) for block in blocks(report)]
    return "\n\n".join(parts) + "\n"


def terminal(report: dict) -> str:
    """The same, with columns under each other; what failed does not widen them."""

    def table(rows: list[list[str]]) -> str:
        whole = [row for row in rows if row[-1]]
        widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)

    return "\n\n".join(block if isinstance(block, str) else table(block) for block in blocks(report))
