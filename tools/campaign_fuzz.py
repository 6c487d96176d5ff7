"""Damaged files of every format, read by the command that reads them: a part of tools/campaign.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from edgeprune.ondevice.bundle import MANIFEST, sha256
from tools.campaign_faults import (
    MOST_ON_DISK,
    Fault,
    bundle_faults,
    contents,
    document_faults,
    faults_of,
    lost,
    on_disk,
    parse_strictly,
)
from tools.campaign_home import SMALL, Home
from tools.campaign_inputs import UNFINISHED, copied, files_like, make_inputs
from tools.campaign_mutations import BINARY, GGUF, JSON, JSON_LINES, SAFETENSORS, TEXT, TOML, Mutation
from tools.campaign_runs import Ended

RATIO = ("--ratios", "30", "--methods", "magnitude", "--json")
ON_ORIN = ("--device", "jetson-orin", "--json")
CODEC = ("--codec", "vq.pt", "--num-heads", "8", "--samples", "4", *RATIO)
PICTURES = ("--calibration", "pictures")
SAMPLES = ("--calibration", "notes.txt", "--samples", "2", "--length", "12")
CHATS = ("--calibration", "chats.jsonl", *SAMPLES[2:])
RESUMED = (*UNFINISHED, "--resume")
WITH_PROFILE, OF_GGUF = ("small", "profile.toml"), ("small.gguf", "cache", "notes.txt")
PROMPT = ("--prompt", "the fox", "--max-new-tokens", "3")


@dataclass(frozen=True)
class Target:
    """A file, by a pattern, and the command that reads it; inputs: what the command needs, which is copied."""

    pattern: str
    mutations: tuple[Mutation, ...]
    words: tuple[object, ...]
    inputs: tuple[str, ...]
    weight: int


def _of_model(folder: str, pattern: str, mutations: tuple[Mutation, ...], weight: int) -> list[Target]:
    """Returns the targets of a file of a checkpoint: it is compared, planned, and nearly fitted."""
    return [
        Target(pattern, mutations, ("compare", folder, *RATIO, *SAMPLES), (folder, "notes.txt"), max(1, weight // 2)),
        Target(pattern, mutations, ("plan", folder, *ON_ORIN), (folder,), max(1, weight // 2)),
        Target(
            pattern,
            mutations,
            ("fit", folder, "--device", "jetson-orin", "--memory", "1KB", *SMALL),  # out of reach, after all was read
            (folder, "notes.txt"),
            max(1, weight // 2),
        ),
    ]


def _of_bundle(pattern: str, weights: dict[str, int]) -> list[Target]:
    """Returns the targets of a document of a bundle, by the commands that read it."""
    commands = {
        "report": ("report", "bundle"),
        "run": ("run", "bundle", *PROMPT),
        "measure": ("measure", "bundle"),
        "ladder": ("report", "ladder"),
        "pick": ("fit", "--from", "ladder", "--pick", "1", "--output", "out"),
    }
    mutations = JSON if pattern.endswith(".json") else TOML if pattern.endswith(".toml") else BINARY
    return [
        Target(f"{source}/{pattern}", mutations, commands[name], (source,), weight)
        for name, weight in weights.items()
        for source in ("ladder" if name in ("ladder", "pick") else "bundle",)
    ]


TARGETS = (
    *_of_model("small", "small/config.json", JSON, 6),
    *_of_model("small", "small/generation_config.json", JSON, 3),
    *_of_model("small", "small/tokenizer.json", JSON, 6),
    *_of_model("small", "small/tokenizer_config.json", JSON, 6),
    *_of_model("small", "small/model.safetensors", SAFETENSORS, 6),
    *_of_model("sharded", "sharded/model.safetensors.index.json", JSON, 4),
    *_of_model("sharded", "sharded/*.safetensors", SAFETENSORS, 1),
    *_of_model("pickled", "pickled/pytorch_model.bin", BINARY, 5),
    *_of_model("small.gguf", "small.gguf", GGUF, 9),
    Target("notes.txt", TEXT, ("compare", "small", *RATIO, *SAMPLES), ("small", "notes.txt"), 3),
    Target("chats.jsonl", JSON_LINES, ("compare", "small", *RATIO, *CHATS), ("small", "chats.jsonl"), 8),
    Target("gpt.pt", BINARY, ("plan", "gpt.pt", "--num-heads", "8", *ON_ORIN), ("gpt.pt",), 4),
    Target("gpt.pt", BINARY, ("compare", "gpt.pt", *CODEC), ("gpt.pt", "vq.pt"), 1),
    Target("vq.pt", BINARY, ("compare", "gpt.pt", *CODEC), ("gpt.pt", "vq.pt"), 2),
    Target("pictures/*/*", BINARY, ("compare", "gpt.pt", *CODEC, *PICTURES), ("gpt.pt", "vq.pt", "pictures"), 3),
    Target("profile.toml", TOML, ("plan", "small", "--profile", "profile.toml", "--json"), WITH_PROFILE, 8),
    Target("run.toml", TOML, ("fit", "--config", "run.toml", "--memory", "1KB"), ("notes.txt", "run.toml"), 8),
    *_of_bundle("manifest.json", {"report": 3, "run": 3, "measure": 1, "ladder": 2, "pick": 2}),
    *_of_bundle("report.json", {"report": 6, "measure": 2}),
    *_of_bundle("deployment.json", {"run": 1, "measure": 4}),
    *_of_bundle("frontier.json", {"ladder": 5}),
    *_of_bundle("rungs/1/report.json", {"pick": 3}),
    *_of_bundle("rungs/1/deployment.json", {"pick": 3}),
    *_of_bundle("profile.toml", {"measure": 1, "pick": 2}),
    *_of_bundle("tokenizer/*.json", {"run": 4}),
    *_of_bundle("rungs/0/onnx/*", {"run": 3, "measure": 1}),
    *_of_bundle("rungs/0/*.npz", {"measure": 1}),
    Target("out.work/journal.jsonl", JSON_LINES, RESUMED, ("out.work", "notes.txt"), 4),
    Target("out.work/*/made.json", JSON, RESUMED, ("out.work", "notes.txt"), 1),
    Target("out.work/*/**/*", BINARY, RESUMED, ("out.work", "notes.txt"), 2),
    Target("cache/probe.json", JSON, ("plan", "small", "--device", "cpu", "--json"), ("small", "cache"), 4),
    Target("cache/models/**/*", BINARY, ("compare", "small.gguf", *RATIO, *SAMPLES), OF_GGUF, 2),
    Target("cache/sensitivities/*", BINARY, UNFINISHED, ("cache", "notes.txt"), 1),
)


def tries(home: Home, random: Random) -> Iterator[tuple[str, list[Fault]]]:
    """Yields a line about each try and its faults, for ever."""
    inputs, weights = make_inputs(home), [target.weight for target in TARGETS]
    while True:
        target = random.choices(TARGETS, weights)[0]
        place = home.begin()
        (place / "notes.txt").unlink()
        copied(inputs, place, target.inputs)
        path = files_like(place, target.pattern, random)
        mutation = random.choice(target.mutations)
        _damage(path, place, mutation, random)
        own = contents(place)
        ended = home.run(target.words, place)
        faults = faults_of(ended) + _untrue(ended, target, place)
        if target.words[0] in ("compare", "plan"):
            own = {name: digest for name, digest in own.items() if not name.startswith("cache/")}
            faults += lost(own, place)
        home.end(place, bool(faults))
        name = path.relative_to(place)
        yield f"{place.name}: {name} {mutation.__name__}, {' '.join(ended.words[:2])} -> {ended.code}", faults


def _damage(path: Path, place: Path, mutation: Mutation, random: Random) -> None:
    """Damages a file; of a bundle sometimes as if it had been made so, with the hash that it has then."""
    path.write_bytes(mutation(path.read_bytes(), random))
    bundle = place / path.relative_to(place).parts[0]
    if bundle.name in ("bundle", "ladder") and path.name != MANIFEST and random.random() < 0.6:
        manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
        manifest["sha256"][str(path.relative_to(bundle))] = sha256(path)
        (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _untrue(ended: Ended, target: Target, place: Path) -> list[Fault]:
    """Returns the faults of what a run wrote that says it did well, and of more than a tiny model needs."""
    faults = []
    if on_disk(place) > MOST_ON_DISK:
        faults.append(Fault("disk", f"{target.words[0]}: {on_disk(place) >> 20} MiB"))
    if ended.code not in (0, 3):
        return faults
    if "--json" in target.words and ended.output.strip():
        try:
            parse_strictly(ended.output)
        except ValueError as error:
            faults.append(Fault("document", f"{target.words[0]} --json: {error}"[:120]))
    for name in ("report.json", "manifest.json", "frontier.json"):
        for bundle in ("bundle", "ladder"):
            if ended.code == 0 and target.words[0] in ("report", "measure") and (place / bundle / name).is_file():
                faults += document_faults(place / bundle / name, f"{target.words[0]} took {name}")
    if (place / "out").is_dir():
        faults += bundle_faults(place / "out")
    return faults
