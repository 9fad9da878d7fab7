"""Encryption of blocks where others could read them: on disk and in object stores. The only user of `cryptography`.

AES-256-GCM. The nonce is random and new with every write (a key serves for 2^32 writes, petabytes of blocks); name and
space are authenticated with the bytes, so a block cannot be passed off as another one. The tag is verified before
anybody is told that there is a block; until then the destination holds bytes that mean nothing.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kelp.core.types import SequenceHash
from kelp.kv.tiers.records import KEY_ID_BYTES, SEAL_BYTES

KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = SEAL_BYTES - _NONCE_BYTES


class Sealer:
    """Encrypts and decrypts blocks of one space with one key.

    Args:
        key: `KEY_BYTES` bytes; see `kv.tiers.keys`.
        space: `records.space_digest`.
    """

    def __init__(self, key: bytes, space: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._algorithm = algorithms.AES(key)
        self._space = space
        self.key_id = hashlib.blake2b(key, digest_size=KEY_ID_BYTES, person=b"kelp-kv-key-id").digest()

    def __repr__(self) -> str:
        return f"Sealer(key_id={self.key_id.hex()})"

    def seal_into(self, plain: memoryview, name: SequenceHash, into: memoryview) -> bytes:
        """Encrypt into a buffer of the same length.

        Returns:
            `SEAL_BYTES` bytes that `open_from` needs.
        """
        nonce = os.urandom(_NONCE_BYTES)
        encryptor = Cipher(self._algorithm, modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(name + self._space)
        num_bytes = encryptor.update_into(plain, into)
        encryptor.finalize()
        assert num_bytes == len(plain)
        return nonce + encryptor.tag

    def open_from(self, ciphertext: memoryview, seal: bytes, name: SequenceHash, into: memoryview) -> bool:
        """Decrypt into a buffer of the same length; False, and junk, if it is not this block under this key."""
        nonce, tag = seal[:_NONCE_BYTES], seal[_NONCE_BYTES:]
        decryptor = Cipher(self._algorithm, modes.GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(name + self._space)
        decryptor.update_into(ciphertext, into)
        try:
            decryptor.finalize()
        except InvalidTag:
            return False
        return True

    def seal(self, plain: memoryview, name: SequenceHash) -> bytes:
        """Nonce, tag and ciphertext in one."""
        sealed = bytearray(SEAL_BYTES + len(plain))
        sealed[:SEAL_BYTES] = self.seal_into(plain, name, memoryview(sealed)[SEAL_BYTES:])
        return bytes(sealed)

    def open(self, sealed: memoryview, name: SequenceHash, into: memoryview) -> bool:
        """Decrypt what `seal` made into `into`, which has the length of the plain bytes; False: see `open_from`."""
        if len(sealed) != SEAL_BYTES + len(into):
            return False
        return self.open_from(sealed[SEAL_BYTES:], bytes(sealed[:SEAL_BYTES]), name, into)
