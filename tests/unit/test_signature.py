"""Signatures hold for the bytes, the signer and the purpose; `ssh-keygen` checks them without vipo."""

import subprocess
from pathlib import Path

import pytest
from audit_fixture import new_key

from vipo.provenance import SignatureError, sign_file, verify_file


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A signed file, ada's key and the file that names her."""
    key, signers = new_key(tmp_path, "ada@example.org")
    path = tmp_path / "a b.json"
    path.write_bytes(b"{}\r\n\0")
    assert sign_file(path, key) == tmp_path / "a b.json.sig"
    return path, key, signers


def test_who_signed_is_told(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, key, signers = signed
    assert verify_file(path, signers) == "ada@example.org"
    _, other = new_key(tmp_path, "bob@example.org")
    both = tmp_path / "both"
    both.write_text(f"# who may sign\n{other.read_text()}{signers.read_text()}")
    assert verify_file(path, both) == "ada@example.org"
    # A signature is replaced, without a question.
    path.write_text("new")
    sign_file(path, key)
    assert verify_file(path, signers) == "ada@example.org"


def test_ssh_keygen_alone_checks_it_as_the_page_says(signed: tuple[Path, Path, Path]) -> None:
    path, _, signers = signed
    page = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("ssh-keygen -Y verify"))
    command = line.replace("-f keys", f"-f '{signers}'").replace("ro-crate-metadata.json", f"'{path}'")
    command = command.replace(f"'{path}'.sig", f"'{path}.sig'")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:25]) == (0, 'Good "vipo" signature for')


def test_what_does_not_hold_is_told(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, _, signers = signed
    _, others = new_key(tmp_path, "mallory")
    with pytest.raises(SignatureError, match=r"a b\.json\.sig: not by a key that .*mallory\.signers names"):
        verify_file(path, others)
    path.write_text("{ }")
    with pytest.raises(SignatureError, match=r"a b\.json\.sig: not a signature of a b\.json as it is"):
        verify_file(path, signers)
    signature = path.with_name(f"{path.name}.sig")
    signature.write_text("none")
    with pytest.raises(SignatureError, match=r"a b\.json\.sig"):
        verify_file(path, signers)
    signature.unlink()
    with pytest.raises(SignatureError, match=r"a b\.json\.sig: missing"):
        verify_file(path, signers)
    with pytest.raises(SignatureError, match=r"a b\.json\.sig: missing"):
        verify_file(path, tmp_path / "nobody")


def test_what_cannot_sign_is_told(
    signed: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, key, _ = signed
    with pytest.raises(SignatureError, match=r"a b\.json: cannot be signed with .*nothing"):
        sign_file(path, tmp_path / "nothing")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SignatureError, match="install OpenSSH"):
        sign_file(path, key)
