"""README.md and docs/: what is written there as commands runs in the order of the page, on small models."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from typer.main import get_command

from edgeprune.cli.app import app
from tests.support import ROOT
from tests.support.bundles import fitted
from tests.support.checkpoints import save_llama
from tests.support.commands import run
from tests.support.device import Server, ssh_server
from tests.support.device_doubles import nvidia_smi, path_to, python_with_doubles
from tests.support.llamagen import random_llamagen
from tests.support.questions import write_questions
from tests.support.vocabularies import byte_level
from tests.support.vq import small_vq

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = (
    "edgeprune serve ",
    "edgeprune draft ",
    "edgeprune push ",
    "edgeprune fleet ",
)  # that tests of their own run
RUN = ("README.md", "docs/fit.md", "docs/runtimes.md")
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it {} "
SMALL = ("--samples", "4", "--length", "32", "--prompt", "16", "--context", "64")
FORMATS = ("--weights", "float,int8", "--cache", "float")
ROOM = ("--memory", "1GiB")  # of so small a model nearly all memory is the runtime's, so that 90 % of it are none
FEWER = {
    "fit": (*SMALL, *FORMATS),
    "fit ./my-model --device jetson-orin": (*SMALL, *FORMATS),
    "fit ./my-model --device jetson-orin --memory": (*SMALL, *FORMATS),
    "fit ./my-model --device jetson-orin --weights": SMALL,
    "fit ./my-model --device rtx-4090": (*SMALL, *ROOM),
    "fit ./my-model --device cpu --decode 70% --recover": (*SMALL, *FORMATS, "--recover", "2"),
    "fit --from": (),
    "fit ./imagegpt-small": ("--samples", "8", "--images", "8", "--cache", "float"),
    "fit c2i.pt": ("--samples", "8", "--images", "8", "--num-heads", "2", *ROOM, *FORMATS),
    "frontier": (*SMALL, *FORMATS),
    "compare": SMALL[:4],
}
"""What a command gets in addition, by its beginning, so that it does not take minutes; the longest counts."""


def commands(page: str) -> list[str]:
    """The commands of a page in its order: those in blocks, and those of the table of what is for what."""
    found, is_block, is_table = [], False, False
    for line in page.splitlines():
        is_block ^= line.startswith("```")
        is_table = line.startswith("|") and (is_table or line.endswith("| command |"))
        if is_table:
            found += re.findall(r"`(edgeprune [^`]*)`", line)
        elif (is_block or line.startswith("    ")) and line.strip().startswith("edgeprune "):
            found.append(line.strip())
    return [
        command
        for command in found
        if "[" not in command and "USER@" not in command and not command.startswith(ELSEWHERE)
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    python = python_with_doubles(tmp_path_factory.mktemp("python"))
    with ssh_server(tmp_path_factory.mktemp("device"), python) as server:
        nvidia_smi(server.folder / "device-bin")
        yield server


@pytest.fixture
def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages' commands name."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 512}
    save_llama(tmp_path / "my-model", vocab_size=608, max_position_embeddings=8192, **sizes)
    byte_level(tmp_path / "my-model")  # with merges, which llama.cpp needs
    (tmp_path / "our-texts").mkdir()
    paragraphs = [TEXT.format(number) * (3 + number % 5) for number in range(40)]
    (tmp_path / "our-texts" / "notes.txt").write_text("\n\n".join(paragraphs))
    for folder in ("logs", "texts-of-june"):
        shutil.copytree(tmp_path / "our-texts", tmp_path / folder)
    said = [{"messages": [{"role": "user", "content": paragraph}]} for paragraph in paragraphs[20:]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in said))
    write_questions(tmp_path / "questions.jsonl")
    shutil.copytree(fitted(tmp_path_factory), tmp_path / "demo-bundle", symlinks=True)
    gpt = random_llamagen(dim=128, heads=2, channels=384, layers=2, vocabulary=64, classes=1001, side=4)
    args = argparse.Namespace(num_classes=1000, image_size=16, downsample_size=4, vocab_size=64, cls_token_num=1)
    torch.save({"model": gpt.state_dict(), "args": args}, tmp_path / "c2i.pt")
    torch.save({"model": small_vq().state_dict()}, tmp_path / "vq_ds16_c2i.pt")
    config = transformers.ImageGPTConfig(vocab_size=65, n_positions=16, n_embd=96, n_layer=2, n_head=3, n_inner=384)
    transformers.ImageGPTForCausalImageModeling(config).save_pretrained(tmp_path / "imagegpt-small")
    clusters = [
        [red / 2 - 1, green / 2 - 1, blue / 2 - 1] for red in range(4) for green in range(4) for blue in range(4)
    ]
    processor = transformers.ImageGPTImageProcessor(clusters=clusters, size={"height": 4, "width": 4})
    processor.save_pretrained(tmp_path / "imagegpt-small")
    return tmp_path


@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run_in_its_order(name: str, home: Path, server: Server) -> None:
    elsewhere = set(commands((ROOT / RUN[0]).read_text())) if name != RUN[0] else set()
    written = [command for command in dict.fromkeys(commands((ROOT / name).read_text())) if command not in elsewhere]
    assert written
    for command in written:
        command = command.replace("ssh://me@orin", server.target).replace("MODEL", "./my-model")
        command = command.replace("c2i_B_384", "c2i")  # a name that would contradict so small a model
        command = command.replace("arc_easy,", "")  # which has to be downloaded
        beginnings = [beginning for beginning in FEWER if command.startswith(f"edgeprune {beginning}")]
        fewer = FEWER[max(beginnings, key=len)] if beginnings else ()
        result = run(*shlex.split(command)[1:], *fewer, cwd=home, path=path_to(server))
        # Whether so small a random model meets a budget says nothing.
        accepted = (0, 3) if result.args[0] in ("fit", "measure") else (0,)
        assert result.returncode in accepted, f"{command}: {result.stderr[-2000:]}"
        if result.args[0] == "fit":
            found = re.search(r"^bundle  (.*)$", result.stdout, re.MULTILINE)
            assert found, f"{command}: {result.stdout}{result.stderr}"
            bundle = found[1]
            listed = (home / bundle / "README.md").read_text()
            for path in (home / bundle).iterdir():
                assert path.name in listed or path.name == "README.md", f"{command}: {path.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_on_a_page_exists(page: Path) -> None:
    known = get_command(app).commands
    for command in re.findall(r"`edgeprune ([a-z]+[^`]*)`", page.read_text()):
        name, *words = command.split()
        assert name in known, command
        options = {opt for parameter in known[name].params for opt in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= options, command


def test_the_bundle_on_the_page_is_what_a_bundle_holds(tmp_path_factory: pytest.TempPathFactory) -> None:
    page = (ROOT / "docs" / "fit.md").read_text().partition("## The bundle")[2]
    for path in fitted(tmp_path_factory).iterdir():
        assert path.name in page
