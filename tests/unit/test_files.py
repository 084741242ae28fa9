"""Files in buckets: whole ones, growing ones, and what a person is told when the bucket refuses."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqmodels import files
from seqmodels.errors import EXIT_INPUT, EXIT_RESTART, InputError, UnreachableError, run_main
from seqmodels.files import (
    GrowingFile,
    copy_folder,
    in_bucket,
    list_folder,
    on_disk,
    refusal,
    to_path,
    told,
    write_file,
)
from tests.fake_gcs import BUCKET

FOLDER = f"gs://{BUCKET}/files"


@pytest.fixture
def folder(gcs, request) -> str:
    return f"{FOLDER}/{re.sub(r'[^a-z0-9_]', '-', request.node.name)}"


def stored(gcs, path: str) -> bytes | None:
    return gcs.objects.get(path.removeprefix(f"gs://{BUCKET}/"))


def test_a_whole_file_is_one_put(gcs, folder):
    before = len(gcs.written)
    write_file(f"{folder}/a", "one")
    write_file(f"{folder}/a", "tw\u00f6\n")
    assert len(gcs.written) == before + 2
    assert to_path(f"{folder}/a").read_text() == "tw\u00f6\n"
    assert [path.name for path in list_folder(to_path(folder))] == ["a"]
    assert list_folder(to_path(f"{folder}/none")) == []


def test_a_file_of_many_parts_appears_only_when_it_is_whole(gcs, folder, monkeypatch):
    """Large ones are sent in parts; here the second is refused."""
    from gcsfs.core import GCSFileSystem

    monkeypatch.setattr(GCSFileSystem._pipe_file, "__defaults__", (None, None, "text/plain", None, 2**18, "overwrite"))
    write_file(f"{folder}/a", b"old")
    parts = []

    def refuse_the_third(request):
        parts.append(request)
        return 403 if request.action == "write" and len(parts) == 3 else None

    with gcs.ruled(refuse_the_third), pytest.raises(InputError, match="403"):
        write_file(f"{folder}/a", bytes(3 * 2**18))
    assert stored(gcs, f"{folder}/a") == b"old"
    write_file(f"{folder}/a", bytes(3 * 2**18))
    assert stored(gcs, f"{folder}/a") == bytes(3 * 2**18)


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_growing_file_goes_on_where_it_was(gcs, folder, tmp_path, where):
    path = tmp_path / "rows" if where == "disk" else f"{folder}/rows"
    for number in (1, 2):
        with GrowingFile(path) as file:
            file.write(f"row {number}\n")
            file.flush()
            assert to_path(path).read_text().endswith(f"row {number}\n")
            file.write(b"bytes\n")
    assert to_path(path).read_text() == "row 1\nbytes\nrow 2\nbytes\n"
    file.write("after the end\n")
    file.close()
    assert to_path(path).read_text().endswith("row 2\nbytes\nafter the end\n")


def test_on_a_disk_nothing_waits_for_a_flush(tmp_path):
    file = GrowingFile(tmp_path / "rows")
    file.write("row\n")
    assert (tmp_path / "rows").read_text() == "row\n"


def test_a_growing_file_is_put_when_it_is_asked_for_and_only_if_it_grew(gcs, folder):
    before = len(gcs.written)
    with GrowingFile(f"{folder}/rows") as file:
        for number in range(100):
            file.write(f"{number}\n")
        assert len(gcs.written) == before
        for _ in range(3):
            file.flush()
        assert len(gcs.written) == before + 1
    assert len(gcs.written) == before + 1


def test_a_growing_file_is_put_by_itself_from_time_to_time(gcs, folder):
    with GrowingFile(f"{folder}/log", seconds=0.05) as file:
        file.write("a line before the program hangs\n")
        deadline = time.monotonic() + 20
        while stored(gcs, f"{folder}/log") is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        puts = gcs.written.count(f"{folder}/log".removeprefix(f"gs://{BUCKET}/"))
        time.sleep(0.3)
        assert gcs.written.count(f"{folder}/log".removeprefix(f"gs://{BUCKET}/")) == puts == 1


def test_what_the_bucket_refuses_is_kept_here(gcs, folder):
    file = GrowingFile(f"{folder}/rows", seconds=0.05)
    with gcs.ruled(lambda request: 403 if request.action == "write" else None):
        file.write("row 1\n")
        time.sleep(0.3)  # its thread is refused, and says nothing
        with pytest.raises(InputError, match=rf"cannot write {folder}/rows: .*\(403\)"):
            file.flush()
        file.write("row 2\n")
        with pytest.raises(InputError, match="what is not stored there is in ") as refused:
            file.close()
    local = str(refused.value).rpartition(" ")[2]
    assert Path(local).read_text() == "row 1\nrow 2\n"
    assert stored(gcs, f"{folder}/rows") is None
    file.close()
    assert stored(gcs, f"{folder}/rows") == b"row 1\nrow 2\n"
    assert not Path(local).exists()


def test_folders_are_copied_to_from_and_within_a_bucket(gcs, folder, tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "x").write_text("x")
    (tmp_path / "a" / "deep" / "y").write_text("y")
    copy_folder(tmp_path / "a", f"{folder}/a")
    copy_folder(f"{folder}/a", f"{folder}/b")
    assert gcs.below(f"{folder}/b".removeprefix(f"gs://{BUCKET}/")) == {"x": b"x", "deep/y": b"y"}
    with on_disk(f"{folder}/b") as copy, on_disk(f"{folder}/b/x") as file, on_disk(f"{folder}/c") as nothing:
        assert (copy / "deep" / "y").read_text() == "y" and file.read_text() == "x" and not nothing.exists()
    with on_disk(tmp_path / "a") as same:
        assert same == tmp_path / "a"
    assert not copy.exists()


def gcsfs_error(code: int) -> Exception:
    from gcsfs.retry import HttpError

    return HttpError({"code": code, "message": "no"})


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError("Forbidden: b/bucket/o\nno"), InputError, "403.*roles/storage.objectUser"),
        (ValueError("PERMISSION_DENIED: no [http_response_code='403']"), InputError, "403.*roles/storage.objectUser"),
        (gcsfs_error(401), InputError, "401.*gcloud auth application-default login"),
        (ValueError("UNAUTHENTICATED: no"), InputError, "401"),
        (gcsfs_error(503), UnreachableError, r"gs://bucket cannot be reached \(503\)"),
        (ValueError("UNAVAILABLE: no"), UnreachableError, "cannot be reached"),
        (ConnectionResetError(104, "reset"), UnreachableError, r"cannot be reached \(ConnectionResetError\)"),
        (OSError(28, "No space left on device"), InputError, "^No space left on device$"),
        (FileNotFoundError("b/bucket/o/a"), None, ""),  # the bucket is there
        (ValueError("DATA_LOSS: no"), None, ""),
        (KeyError("a"), None, ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_bucket_refuses_is_told_from_other_errors(gcs, monkeypatch, error, kind, said):
    monkeypatch.setattr(files, "_is_googles_machine", lambda: False)
    found = refusal(error, f"{FOLDER}/a")
    assert type(found) is (kind or type(None)) and "\n" not in str(found)
    assert found is None or re.search(said, str(found)), found
    if kind is None:
        with pytest.raises(type(error)), told("cannot", f"{FOLDER}/a"):
            raise error


def test_a_machine_of_googles_that_is_nobody_for_a_moment_is_started_again(monkeypatch):
    """Its account comes from a server that sometimes does not answer; a person's has to be given."""
    monkeypatch.setattr(files, "_is_googles_machine", lambda: True)
    for error in (gcsfs_error(401), ValueError("UNAUTHENTICATED: no")):
        assert isinstance(refusal(error, f"{FOLDER}/a"), UnreachableError)


def test_a_bucket_that_is_not_there_is_told(gcs):
    with pytest.raises(InputError, match=r"^cannot write gs://buckut/a: there is no bucket gs://buckut \(404\)$"):
        write_file("gs://buckut/a", "text")


@pytest.mark.parametrize(
    "path", ["gs://", "gs://b", "s3://bucket/run", "gs:///run", "gs://Bucket/run", "gs://bucket/run[1]"]
)
def test_an_address_of_another_form_is_refused(path):
    with pytest.raises(InputError, match="gs://BUCKET/FOLDER"):
        to_path(path)
    assert not in_bucket("runs/gs:")


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[gcs\]'"):
        to_path(f"{FOLDER}/a")


@pytest.mark.parametrize(("error", "code"), [(InputError("no"), EXIT_INPUT), (UnreachableError("no"), EXIT_RESTART)])
def test_what_may_pass_by_itself_asks_for_a_restart(error, code, monkeypatch, capsys):
    def program(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        run_main(program)
    assert end.value.code == code and capsys.readouterr().err == "error: no\n"


def test_importing_it_imports_neither_jax_nor_orbax():
    program = "import sys, seqmodels.files; assert not {'jax', 'orbax', 'fsspec'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
