"""Key agreement and encryption between members: X25519, HKDF-SHA256, ChaCha20-Poly1305.

Every derivation says in its info what the key is for and where it belongs, so no key serves two ends.
Bonawitz et al., CCS 2017, figure 4.  https://eprint.iacr.org/2017/281
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trellis.errors import SecAggError
from trellis.secagg import transcript

KEY_BYTES = 32
TAG_BYTES = 16
_P = 2**255 - 19
_ORDER_8 = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
_SMALL_ORDER = frozenset((*_ORDER_8, 0, 1, _P - 1, _P, _P + 1))
"""u-coordinates with which every key agreement ends in zeros.  Bernstein, https://cr.yp.to/ecdh.html"""


def generate() -> tuple[bytes, bytes]:
    """(private, public), 32 bytes each, from the OS."""
    key = X25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public key that belongs to a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def coordinate(public: bytes) -> int:
    """What X25519 reads of a public key: all but its highest bit, mod p."""
    return (int.from_bytes(public, "little") & ((1 << 255) - 1)) % _P


def is_weak(public: bytes) -> bool:
    """Whether a public key is of small order: whoever sends it knows the secret it ends in."""
    return coordinate(public) in _SMALL_ORDER


def agree(private: bytes, public: bytes, label: str, *context: bytes | str | int) -> bytes:
    """32 bytes that the owners of both keys can derive, for one purpose.

    Raises SecAggError("bad_key") for a public key of small order.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecAggError("bad_key", "a public key of small order") from error
    return derive(shared, label, *context)


def derive(secret: bytes, label: str, *context: bytes | str | int) -> bytes:
    """HKDF-SHA256 of a secret, the label and context in its info.  -> 32 bytes"""
    info = transcript.framed(label, *context)
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def encrypt(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """ChaCha20-Poly1305.  A key encrypts one message, so the nonce is zero."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plaintext, associated)


def decrypt(key: bytes, ciphertext: bytes, associated: bytes) -> bytes | None:
    """The plaintext, or None when key, text or associated data are not those of the encryption."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), ciphertext, associated)
    except (InvalidTag, ValueError):
        return None
