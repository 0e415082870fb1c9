"""Signatures by SSH keys, made and checked by ``ssh-keygen -Y``: whoever can push to a repository has such a key.

The format is OpenSSH's (PROTOCOL.sshsig), the namespace `vipo`: a signature made for another purpose is none here.
"""

import subprocess
from pathlib import Path

from vipo.errors import VipoError

_NAMESPACE = "vipo"


class SignatureError(VipoError):
    """A file cannot be signed, or a signature does not hold; the message says which and why."""


def sign_file(path: Path, key: Path) -> Path:
    """Sign `path` into ``<path>.sig``.

    Args:
        path: any file.
        key: private key, or public key of one that an agent holds.

    Returns:
        The path of the signature, which replaces an earlier one.

    Raises:
        SignatureError: ssh-keygen is missing or refuses.
    """
    signature = path.with_name(f"{path.name}.sig")
    signature.unlink(missing_ok=True)
    # A key with a passphrase asks for it on the terminal.
    _ssh_keygen("sign", "-f", str(key), "-n", _NAMESPACE, str(path), failure=f"{path}: cannot be signed with {key}")
    return signature


def verify_file(path: Path, allowed_signers: Path) -> str:
    """Check that ``<path>.sig`` is a signature of `path` by someone whom `allowed_signers` names.

    Args:
        path: a signed file.
        allowed_signers: principals and public keys, as in ssh-keygen's section ALLOWED SIGNERS.

    Returns:
        The signer's principal.

    Raises:
        SignatureError: the signature is missing, by an unknown key, or of other bytes.
    """
    signature = path.with_name(f"{path.name}.sig")
    for file in (path, signature, allowed_signers):
        if not file.is_file():
            raise SignatureError(f"{file}: missing")
    given = ("-f", str(allowed_signers), "-s", str(signature))
    found = _ssh_keygen("find-principals", *given, failure=f"{signature}: not by a key that {allowed_signers} names")
    principal = found.splitlines()[0]
    _ssh_keygen(
        "verify", *given, "-I", principal, "-n", _NAMESPACE,
        content=path.read_bytes(), failure=f"{signature}: not a signature of {path.name} as it is",
    )  # fmt: skip
    return principal


def _ssh_keygen(action: str, *arguments: str, failure: str, content: bytes | None = None) -> str:
    try:
        done = subprocess.run(["ssh-keygen", "-Y", action, *arguments], input=content, capture_output=True)
    except FileNotFoundError as error:
        raise SignatureError("signatures need ssh-keygen; install OpenSSH 8.2 or later") from error
    if done.returncode != 0:
        reason = " ".join(done.stderr.decode(errors="replace").split())
        raise SignatureError(f"{failure} ({reason or f'ssh-keygen exit status {done.returncode}'})")
    return done.stdout.decode(errors="replace")
