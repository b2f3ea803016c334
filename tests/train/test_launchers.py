"""The real torchrun and deepspeed as two nodes of one machine: they precompute, train and resume one run.

srun is simulated in test_launch.py, for it is a client of a daemon.
"""

import json
from pathlib import Path

import pytest
import torch

from kinoflow.data.latents.shards import LatentDataset
from tests.train.launching import begin, end, free_port, put
from tests.train.tiny import BUCKET, DIT, write_release

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two nodes on one machine, without GPUs")

SHAPE = [*DIT, "dit.max_tokens=[4,8,8]", "data.batch_size=2", "log_every=1"]
# Runs the command of every host here, as a remote shell does: with what the command exports, and little else.
PDSH = """#!/bin/bash
[ "$1 $2 $4" = "-S -f -w" ] || exit 9
IFS=, read -ra hosts <<< "$5"
shift 5
command="$*"
for rank in "${!hosts[@]}"; do
  echo "${hosts[rank]}" >> "$0.hosts"
  env -i HOME="$HOME" PATH="$PATH" bash -c "${command//%n/$rank}" &
  running+=($!)
done
code=0
for each in "${running[@]}"; do wait "$each" || code=$?; done
exit $code
"""
SSH = '#!/bin/bash\necho "${@: -2}" >> "$0.asked"\n'


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    put(folder / "bin", pdsh=PDSH, ssh=SSH)
    (folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    write_release(folder / "release")
    return folder


def deepspeed(desk: Path, options: list[str], words: list[str]) -> str:
    """What `deepspeed` and its two processes print."""
    command = ["deepspeed", *options, "--master_port", free_port(), "--module", "kinoflow.train", *words]
    codes, text = end([begin(command, desk / "bin")])
    assert codes == [0], text
    return text


@pytest.fixture(scope="module")
def latents(desk: Path) -> str:
    """Two slots of one machine. A CPU has no GPUs to count: the command says how many processes."""
    words = ["precompute", "source=world", "clips=4", "shard_size=1", f"buckets=[{BUCKET}]",
             f"release={desk / 'release'}", f"out={desk / 'latents'}"]  # fmt: skip
    return deepspeed(desk, ["--num_gpus", "2"], words)


@pytest.fixture(scope="module")
def trained(desk: Path, latents: str) -> list[str]:
    """The words of a run of two steps, made by two torchruns."""
    words = [*SHAPE, f"data.latents={desk / 'latents'}", f"run={desk / 'run'}"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    nodes = [[*command, "--node-rank", rank, "-m", "kinoflow.train", *words, "steps=2"] for rank in "01"]
    codes, text = end([begin(node, desk / "bin") for node in nodes])
    assert codes == [0, 0], text
    return words


def checkpoint(desk: Path, step: int) -> dict:
    return json.loads((desk / "run" / "checkpoints" / f"{step:08d}" / "state.json").read_text())


def logged(desk: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (desk / "run" / "log.jsonl").read_text().splitlines()]


def test_deepspeed_without_a_hostfile_precomputes(desk, latents):
    assert latents.count("2 of 4 shards to make") == 2, latents
    data = LatentDataset(desk / "latents")
    assert all(data.captions(BUCKET, clip)[0] for clip in range(4))


def test_two_torchruns_are_one_run(desk, trained):
    assert checkpoint(desk, 2)["processes"] == 2


def test_deepspeed_with_a_hostfile_goes_on(desk, trained):
    """The words with spaces arrive whole, through a shell on each node."""
    words = [*trained, "steps=4", "preview_prompts=two words.txt"]
    text = deepspeed(desk, ["--hostfile", str(desk / "hosts"), "--master_addr", "127.0.0.1"], words)
    assert (desk / "bin" / "pdsh.hosts").read_text().split() == ["node-a", "node-b"]
    assert (desk / "bin" / "ssh.asked").read_text() == "node-a hostname\n"
    assert (
        "resuming with preview_prompts: None -> two words.txt" in text
        and "step 1/4" not in text
        and "step 3/4" in text
    )
    assert checkpoint(desk, 4)["processes"] == 2
    assert logged(desk) == [1, 2, 3, 4]


def test_torchrun_starts_again_what_died(desk, tmp_path):
    """The store that torchrun keeps over restarts has the addresses of processes that are gone."""
    words = ["steps=12", "checkpoint_every=4", "log_every=1", f"run={tmp_path}"]
    command = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", free_port()]
    codes, text = end([begin([*command, "-m", "tests.train.dying", *words], desk / "bin")])
    assert codes == [0], text
    assert text.count("step 5/12") == 2, "from the checkpoint on"
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        *range(1, 13)
    ]
