"""The build of the CUDA library: what it is made of, where it lies, and one clear line where it cannot be made."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusedlora import __main__ as cli
from fusedlora import cuda, cuda_build, dropout, node_build
from fusedlora.config import Problem
from fusedlora.cuda_config import CudaConfig, Share, job_rows, shares

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux")
needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on PATH")

SCRIPT = """#!/bin/sh
case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit;; esac
{failing}
while [ $# -gt 1 ]; do shift; done
echo library > "$1"
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    node = tmp_path / "node.so"
    node.touch()
    monkeypatch.setattr(node_build, "build", lambda: node)
    return tmp_path / "cache/fusedlora"


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a script in nvcc's place."""

    def make(release: str = "13.0", failing: str = "") -> Path:
        path = tmp_path / "cuda/bin/nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SCRIPT.format(release=release, failing=failing))
        path.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        return path

    return make


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `python -m fusedlora build` fails with."""
    assert cli.main(["build"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_no_nvcc(monkeypatch, capsys) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert failure(capsys) == "not built: nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda/bin"


def test_an_old_nvcc(nvcc, capsys) -> None:
    path = nvcc("12.4")
    assert failure(capsys) == f"not built: {path} is 12.4, the kernels need 12.5 or newer"


def test_an_nvcc_that_is_none(nvcc, capsys) -> None:
    path = nvcc()
    path.write_text("#!/bin/sh\necho hello\n")
    assert failure(capsys) == f"not built: {path} --version names no release"
    path.write_text("#!/no/such/shell\n")
    assert failure(capsys).startswith(f"not built: {path} does not run (")


def test_no_ninja(nvcc, monkeypatch, capsys) -> None:
    nvcc()
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **kwargs: None if name == "ninja" else which(name, **kwargs))
    assert failure(capsys) == "not built: ninja was not found (pip install ninja)"


def test_another_system(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert failure(capsys) == "not built: the CUDA kernels are built on Linux, this is win32"


@needs_ninja
def test_a_failing_compiler(nvcc, capsys, cache_folder: Path) -> None:
    path = nvcc(failing='echo "lora.cu(7): error: no such thing"; echo "and more"; exit 2')
    (log,) = [match[1] for match in [re.search(r"all of its output: (.*)\)$", failure(capsys))] if match]
    assert "and more" in Path(log).read_text()
    with pytest.raises(cuda_build.BuildError) as raised:
        cuda_build.build(lambda line: None)
    assert str(raised.value).startswith(f"{path} failed: lora.cu(7): error: no such thing (")
    assert cuda_build.find_library() is None and not list(cache_folder.rglob("*.so"))
    assert not list(cache_folder.rglob("build-*")), "scratch is removed"


@needs_ninja
def test_a_cache_that_cannot_be_written(nvcc, monkeypatch, tmp_path: Path, capsys) -> None:
    nvcc()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert failure(capsys).startswith(f"not built: cannot write {tmp_path}/file/fusedlora/")


@needs_ninja
def test_a_build_is_made_once_and_found(nvcc, capsys, cache_folder: Path) -> None:
    nvcc()
    assert cuda_build.find_library() is None
    assert cli.main(["build"]) == 0
    *progress, last, node = capsys.readouterr().out.splitlines()
    units = len(cuda_build.UNITS) + 1
    assert len(progress) == units and progress[-1].split()[0] == f"[{units}/{units}]"
    library = cuda_build.find_library()
    assert library is not None and last.startswith(f"{library}: ") and last.endswith(" s")
    assert "/node.so: 0.0 MB" in node
    assert library.read_text() == "library\n" and library.parent.parent == cache_folder
    nvcc(failing="exit 1")
    assert cuda_build.build(print) == library, "nothing is compiled again"
    nvcc("13.1")
    newer = cuda_build.build(lambda line: None)
    assert newer != library and cuda_build.find_library() == newer
    nvcc("12.10")
    cuda_build.build(lambda line: None)
    assert cuda_build.find_library() == newer, "versions are compared as numbers"


@needs_ninja
def test_changed_sources_are_another_library(nvcc, monkeypatch, tmp_path: Path) -> None:
    nvcc()
    assert cuda_build.build(lambda line: None) == cuda_build.find_library()
    copy = tmp_path / "a folder with $ and :"
    shutil.copytree(cuda_build.sources_dir(), copy)
    monkeypatch.setattr(cuda_build, "sources_dir", lambda: copy)
    before = cuda_build.sources_hash()
    cuda_build.sources_hash.cache_clear()
    assert cuda_build.sources_hash() == before
    (copy / "lora.cuh").write_text((copy / "lora.cuh").read_text() + "\n")
    cuda_build.sources_hash.cache_clear()
    assert cuda_build.sources_hash() != before and cuda_build.find_library() is None
    library = cuda_build.build(lambda line: None)
    assert library == cuda_build.find_library() and not list(library.parent.glob("build-*"))
    cuda_build.sources_hash.cache_clear()


def test_every_direction_rank_and_number_of_terms_is_a_unit() -> None:
    text = (cuda_build.sources_dir() / "lora.cu").read_text()
    instances = re.findall(r"^FUSEDLORA_EXTERN\((\d+), (\d)\)", text, re.MULTILINE)
    decoding = re.findall(r"extern template int decode<(\w+)>", text)
    defines = {
        (
            f"-DFUSEDLORA_UNIT_RANKS={ranks}",
            f"-DFUSEDLORA_UNIT_BACKWARD={backward}",
            f"-DFUSEDLORA_UNIT_TERMS={terms}",
        )
        for ranks, terms in instances
        for backward in (0, 1)
    }
    decode_defines = {(f"-DFUSEDLORA_UNIT_DECODE={int(dtype == '__nv_bfloat16')}",) for dtype in decoding}
    assert len(instances) == 6 and len(decode_defines) == 2
    assert defines | decode_defines | {("-DFUSEDLORA_UNITS",)} == set(cuda_build.UNITS.values())


def test_no_more_jobs_than_memory(monkeypatch) -> None:
    monkeypatch.setattr(cuda_build.os, "sched_getaffinity", lambda process: set(range(64)))
    assert 1 <= cuda_build._jobs() <= len(cuda_build.UNITS)
    monkeypatch.setattr(cuda_build, "MEMORY_PER_JOB", 1 << 60)
    assert cuda_build._jobs() == 1


def test_the_packed_arguments_are_the_structs(tmp_path: Path) -> None:
    """A C compiler tells where the members lie, how large they are and whether they are numbers or addresses."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    names = (*cuda.SETTINGS, *cuda.POINTERS, *cuda.NUMBERS)
    kind = '_Generic((({0}*)0)->{1}, int64_t: "q", double: "d", default: "Q")'
    lines = [f'printf("{n} %zu %s\\n", offsetof(Arguments, {n}), {kind.format("Arguments", n)});' for n in names]
    program = '#include <stdio.h>\n#include <stddef.h>\n#include "arguments.h"\nint main(void) {\n' + "\n".join(lines)
    (tmp_path / "tell.c").write_text(program + 'printf("size %zu\\n", sizeof(Arguments));\n}\n')
    include = f"-I{cuda_build.sources_dir()}"
    subprocess.run([compiler, "-std=c11", include, "tell.c", "-o", "tell"], cwd=tmp_path, check=True)
    told = subprocess.run([tmp_path / "tell"], capture_output=True, text=True, check=True).stdout.split("\n")
    kinds = [*"q" * len(cuda.SETTINGS), *"Q" * len(cuda.POINTERS), *"ddqqq"]
    assert told[:-2] == [f"{name} {8 * i} {kind}" for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    assert told[-2] == f"size {8 * len(names)}"


def test_the_masks_of_both_languages_have_the_same_factors() -> None:
    text = (cuda_build.sources_dir() / "skinny.cuh").read_text()
    body = text[text.index("void hash(uint32_t") : text.index("uint32_t keep(")]
    factors = [int(number, 16) for number in re.findall(r"0x(\w{8})u", body)]
    assert [f for f in factors if f != 0x7FFF7FFF] == [dropout.C0, dropout.C1, dropout.C2, dropout.C3]


def told_by(program: str, folder: Path) -> list[str]:
    """The lines that a C++ program prints which uses csrc/shares.h."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "tell.cpp").write_text('#include <cstdio>\n#include <initializer_list>\n#include "shares.h"\n' + program)
    include = f"-I{cuda_build.sources_dir()}"
    subprocess.run([compiler, "-std=c++17", include, "tell.cpp", "-o", "tell"], cwd=folder, check=True)
    return subprocess.run([folder / "tell"], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    "pairs_m, tiles_n, group, stride, slices",
    [(32, 4, 4, 66, 4), (32, 8, 4, 66, 4), (2, 8, 4, 66, 4), (7, 3, 4, 66, 2), (33, 56, 4, 66, 4), (5, 9, 3, 7, 2)],
)
def test_slices_are_shared_out_to_tiles_that_wait_for_nobody_in_vain(
    pairs_m: int, tiles_n: int, group: int, stride: int, slices: int, tmp_path: Path
) -> None:
    """Each slice of each pair of rows once; all clusters get through their tiles, which wait for them."""
    program = f"""
int main() {{
  const auto tiles = fusedlora::Tiles::of({pairs_m}, {tiles_n}, {group}, {stride}, {slices});
  for (int place = 0; place < {stride}; place++) {{
    for (int n = 0; n < tiles.owned(place); n++) {{
      int pair_m, tile_n;
      tiles.coordinates(tiles.first(place) + n * {stride}, pair_m, tile_n);
      printf("%d %d %d %d\\n", place, pair_m, tile_n, tiles.slice(pair_m, tile_n));
    }}
  }}
}}
"""
    own: dict[int, list[tuple[int, int]]] = {}
    seen, cut, halves = [], [], []
    for place, pair, column, slice in (tuple(map(int, line.split())) for line in told_by(program, tmp_path)):
        own.setdefault(place, []).append((pair, slice))
        seen.append((pair, column))
        if slice >= 0:
            cut.append((pair, slice))
            halves.append((pair, column, slice))
    assert sorted(seen) == [(m, n) for m in range(pairs_m) for n in range(tiles_n)]
    assert sorted(cut) == [(m, n) for m in range(pairs_m) for n in range(slices)]
    assert all(column % 2 == (slice >= slices // 2) for _, column, slice in halves)
    there: set[tuple[int, int]] = set()
    while own:
        there |= {tiles[0] for tiles in own.values()}  # a tile leaves its slice before it waits
        done = [p for p, tiles in own.items() if all((tiles[0][0], n) in there for n in range(slices))]
        assert done, own
        for place in done:
            del own[place][0]
            if not own[place]:
                del own[place]


@pytest.mark.parametrize("db, da, stride, tiles", [(64, 64, 66, 8), (4, 64, 66, 7), (0, 16, 66, 2), (224, 64, 65, 27)])
@pytest.mark.parametrize("of_few_tiles", [False, True])
@pytest.mark.parametrize("first_place", [0, 16, 66])
def test_every_job_has_one_turn(
    db: int, da: int, stride: int, tiles: int, of_few_tiles: bool, first_place: int, tmp_path: Path
) -> None:
    """All jobs of dB and dA, each once, dA's not before T as a rule, and spread over the tiles."""
    tiles = 1 if of_few_tiles else tiles
    program = f"""
int main() {{
  for (int place = 0; place < {stride}; place++) {{
    const int tiles = {tiles} - (place < 5);
    const auto jobs = fusedlora::Jobs::of({db}, {da}, place, {first_place}, {stride}, tiles);
    for (int tile = 0, done = 0; tile <= tiles; tile++) {{
      for (; jobs.due(done, tile); done++) {{
        printf("%d %d %d %d %d\\n", jobs.is_da(done), jobs.index(done), tile, tiles, place);
      }}
    }}
  }}
}}
"""
    turns = [tuple(map(int, line.split())) for line in told_by(program, tmp_path)]
    assert sorted(turn[:2] for turn in turns) == [(0, n) for n in range(db)] + [(1, n) for n in range(da)]
    busy = {place for *_, place in turns}
    assert busy == {(first_place + n) % stride for n in range(min(db + da, stride))}
    for is_da, _, tile, own, _ in turns:
        assert min(1, own) <= tile <= max(own - 1, min(own, 1))
        assert not is_da or tile >= min(2, max(own - 1, min(own, 1)))
    if tiles > 3:
        assert len({turn[2] for turn in turns}) >= tiles - 2


@pytest.mark.parametrize("db_with_t", [False, True])
@pytest.mark.parametrize(
    "M, out, depth, parts, units",
    [
        *((8192, 4096, 4096, 2, 16), (8192, 4096, 1024, 3, 16), (512, 4096, 4096, 1, 2), (300, 520, 14336, 7, 2)),
        *((8192, 2048, 8192, 2, 24), (2048, 4096, 4096, 4, 0)),
        *((8192, 4096, 4096, 8, 11), (16384, 3584, 512, 3, 64), (33 * 256, 66 * 256, 66 * 256, 1, 66)),
    ],
)
def test_the_cost_model_shares_out_as_the_kernels_do(
    M: int, out: int, depth: int, parts: int, units: int, db_with_t: bool, tmp_path: Path
) -> None:
    """`units`: how many clusters sum S or T."""
    config = CudaConfig(256, 4, 132, units, parts, db_with_t=db_with_t, first_job=units // 2)
    pairs_of_a_unit = 2 if db_with_t else 1
    program = f"""
using namespace fusedlora;
int main() {{
  const int pairs_m = {-(-M // 256)}, shrink_clusters = {config.shrink_clusters};
  const int units_m = {-(-M // 256 // pairs_of_a_unit)};
  const auto tiles = Tiles::of(pairs_m, {-(-out // 256)}, 4, 66, 0);
  for (int place = 0; place < 66; place++) {{
    const int own = tiles.owned(place);
    const int db_jobs = {int(not db_with_t)} * job_count({depth}, {parts});
    const auto jobs = Jobs::of(db_jobs, job_count({out}, {parts}), place, {config.first_job}, 66, own);
    int units = 0, counts[2] = {{}};
    for (int unit = place; place < shrink_clusters && unit < units_m; unit += shrink_clusters) units++;
    for (int n = 0; n < jobs.count; n++) counts[jobs.is_da(n)]++;
    printf("%d %d %d %d\\n", own, units, counts[0], counts[1]);
  }}
}}
"""
    problem = Problem(M, out, depth, 16, 2, False, 90, 132)

    def of_each(forward: bool, **kind: bool) -> list[Share]:
        return [share for places, share in shares(problem, config, forward, **kind) for _ in places]

    found = of_each(False)
    assert [tuple(share) for share in found] == [tuple(map(int, line.split())) for line in told_by(program, tmp_path)]
    assert sum(share.units for share in found) == (-(-M // 256 // pairs_of_a_unit) if units else 0)
    assert not any(share.tiles for share in of_each(False, tiles=False))
    assert not any(share.db_jobs + share.da_jobs for share in of_each(True))


def test_rows_of_a_jobs_stage(tmp_path: Path) -> None:
    program = """
int main() {
  for (int block_n : {128, 256})
    for (int ranks : {16, 64, 128, 256}) printf("%d %d %d\\n", block_n, ranks, fusedlora::job_rows(block_n, ranks));
}
"""
    told = [tuple(map(int, line.split())) for line in told_by(program, tmp_path)]
    assert told == [(block_n, r, job_rows(block_n, r)) for block_n in (128, 256) for r in (16, 64, 128, 256)]


def test_the_decode_kernel_shares_everything_out_once(tmp_path: Path) -> None:
    """Depth over the blocks of a cluster, units over their warps, bytes."""
    told = told_by(
        """
using namespace fusedlora;
int main() {
  for (int split = 1; split <= DECODE_MAX_SPLIT; split *= 2) {
    for (int K : {8, 64, 72, 776, 4096, 14336}) {
      printf("depth %d %d", split, K);
      for (int rank = 0; rank <= split; rank++) printf(" %d", depth_begin(K, rank, split));
      puts("");
    }
    for (int groups = 4; groups <= 4 * split && groups <= 8; groups *= 2) {
      printf("units %d %d", split, groups);
      for (int rank = 0; rank < split; rank++) {
        for (int warp = 0; warp < 4; warp++) {
          const Finisher f = finisher(rank, warp, split, groups);
          for (int tile = f.first; tile < 8; tile += f.step) printf(" %d", f.group * 8 + tile);
        }
      }
      puts("");
    }
  }
  printf("bytes 0 0");
  for (int unit = 0; unit < 96; unit++) {
    for (int lane = 0; lane < 32; lane++) printf(" %d", unit_bytes(unit, lane));
  }
  puts("");
}
""",
        tmp_path,
    )
    assert len(told) == 4 * 6 + 7 + 1
    for line in told:
        kind, *words = line.split()
        split, about, *found = map(int, words)
        if kind == "depth":
            steps = [b - a for a, b in zip(found, found[1:])]
            assert len(steps) == split and found[0] == 0 and found[-1] == -(-about // 64), line
            assert min(steps) >= 0 and max(steps) - min(steps) <= 1, line
        elif kind == "units":
            assert sorted(found) == list(range(8 * about)), line
        else:
            assert found == list(range(0, 96 * 512, 16))
