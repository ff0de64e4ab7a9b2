"""Reading synset tars: every entry is told, and no tar ends early in silence."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipelines.data.archive import DIRECTORY, find_tars, fingerprint, image_problem, scan_tar
from pipelines.errors import ArchiveError

WriteTar = Callable[..., Path]
Jpeg = Callable[[int], bytes]


@pytest.fixture
def tar(tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg) -> Path:
    return write_tar(tmp_path / "n01.tar", {f"n01_{n}.JPEG": jpeg(n) for n in range(6)})


def overwrite(path: Path, start: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


def png(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (3, 2)).save(file, "PNG")
    return file.getvalue()


def test_tars_are_found_in_sorted_order(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("n3.tar", "n1.tar", "n2.tar", ".n0.tar"):
        write_tar(tmp_path / name, {})
    (tmp_path / "words.txt").write_text("n1\tcat\n")
    assert [path.name for path in find_tars(tmp_path)] == ["n1.tar", "n2.tar", "n3.tar"]


def test_a_missing_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"absent does not exist; expected is a folder with one"):
        find_tars(tmp_path / "absent")


def test_a_file_is_no_archive(tar: Path) -> None:
    with pytest.raises(ArchiveError, match=r"n01\.tar is a file; expected is a folder"):
        find_tars(tar)


def test_a_folder_without_tars_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"holds no tars; expected is a folder"):
        find_tars(tmp_path)


def test_the_fingerprint_follows_names_and_sizes(tmp_path: Path, tar: Path) -> None:
    before = fingerprint(find_tars(tmp_path))
    assert before == fingerprint(find_tars(tmp_path))
    other = tar.rename(tmp_path / "n02.tar")
    renamed = fingerprint(find_tars(tmp_path))
    other.write_bytes(other.read_bytes() + bytes(512))
    assert len({before, renamed, fingerprint(find_tars(tmp_path))}) == 3


def test_offsets_lead_to_the_bytes_of_every_member(tar: Path, jpeg: Jpeg) -> None:
    content = tar.read_bytes()
    members = list(scan_tar(tar))
    assert [member.key for member in members] == [f"n01_{n}" for n in range(6)]
    for n, member in enumerate(members):
        assert member.problem is None
        assert content[member.offset : member.offset + member.size] == jpeg(n)


def test_an_empty_synset_has_no_members(tmp_path: Path, write_tar: WriteTar) -> None:
    assert list(scan_tar(write_tar(tmp_path / "n01.tar", {}))) == []


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01_7.JPEG", "n01_7"),
        ("n01/n01_7.JPEG", "n01_7"),
        ("n01_7.v2.JPEG", "n01_7_v2"),
        ("0007.jpg", "n01_0007"),
        ("n01_é.png", "n01_é"),
        ("n01_\udcff.jpg", "n01_\\xff"),
    ],
)
def test_keys_have_no_dots_and_start_with_the_synset(
    tmp_path: Path, write_tar: WriteTar, jpeg: Jpeg, name: str, key: str
) -> None:
    (member,) = scan_tar(write_tar(tmp_path / "n01.tar", {name: jpeg(0)}))
    assert (member.key, member.problem) == (key, None)


def test_directories_links_and_other_files_are_told_with_reasons(tmp_path: Path) -> None:
    path = tmp_path / "n01.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("sub", tarfile.DIRTYPE), ("n01_1.JPEG", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            tar.addfile(info)
        fifo = tarfile.TarInfo("n01_2.JPEG")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
        tar.addfile(tarfile.TarInfo("README.txt"))
        tar.addfile(tarfile.TarInfo("n01_3.JPEG"))
    assert [member.problem for member in scan_tar(path)] == [
        DIRECTORY,
        "is a link",
        "is not a plain file",
        "is not an image by its name (suffix '.txt')",
        "is empty",
    ]


def test_a_damaged_image_is_told_in_pillows_words(jpeg: Jpeg) -> None:
    data = jpeg(0)
    assert image_problem(data) is None
    assert "does not decode: image file is truncated" in str(image_problem(data[:-40]))
    assert image_problem(b"<html>404</html>") == "does not decode: cannot identify image file"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1"])
def test_every_kind_of_pixel_is_an_image(mode: str) -> None:
    assert image_problem(png(mode)) is None


def test_a_decompression_bomb_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png("RGB")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert "decompression bomb" in str(image_problem(bomb))


def test_a_member_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "n01.tar"
    info = tarfile.TarInfo("n01_0.JPEG")
    info.size = 2**31
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + 2**31 + 1024)  # a hole: no disk is used
    assert next(scan_tar(path)).problem == "has 2147483648 bytes, more than the limit of 268435456"


@pytest.mark.parametrize("kept", [0, 100, 700, 1024, 3000])
def test_a_truncated_tar_is_refused(tar: Path, kept: int) -> None:
    tar.write_bytes(tar.read_bytes()[:kept])
    with pytest.raises(ArchiveError, match=rf"n01\.tar is cut off: it ends at byte {kept}; fetch"):
        list(scan_tar(tar))


def test_a_tar_without_its_end_blocks_is_refused(tar: Path) -> None:
    *_, last = scan_tar(tar)
    end = last.offset + last.size + -last.size % 512
    tar.write_bytes(tar.read_bytes()[:end])
    with pytest.raises(ArchiveError, match=f"is cut off: it ends at byte {end}"):
        list(scan_tar(tar))


def test_a_damaged_header_is_refused_with_its_byte(tar: Path) -> None:
    header = list(scan_tar(tar))[3].offset - 512
    overwrite(tar, header, b"\xff" * 200)
    with pytest.raises(ArchiveError, match=f"is damaged: no tar header at byte {header} of"):
        list(scan_tar(tar))


def test_a_damaged_first_header_is_refused(tar: Path) -> None:
    overwrite(tar, 0, b"\xff" * 200)
    with pytest.raises(ArchiveError, match="is damaged: no tar header at byte 0 of"):
        list(scan_tar(tar))


def test_members_after_the_end_blocks_are_not_lost_in_silence(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(ArchiveError, match=r"goes on after its end-of-archive blocks at byte \d+"):
        list(scan_tar(tar))


def test_a_header_of_negative_size_does_not_go_round_in_circles(tar: Path) -> None:
    second = list(scan_tar(tar))[1].offset - 512
    info = tarfile.TarInfo("n01_1.JPEG")
    info.size = -1024
    overwrite(tar, second, info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ArchiveError, match="is damaged: no tar header at byte"):
        list(scan_tar(tar))


def test_a_tar_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"n09\.tar cannot be read: No such file"):
        list(scan_tar(tmp_path / "n09.tar"))
