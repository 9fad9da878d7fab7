"""Which attention backend serves: the fastest that this device, this torch and this model allow."""

from __future__ import annotations

import importlib
import logging

import torch

from kelp.core.errors import ConfigError
from kelp.executor.torch.attention.base import Attention, AttentionShape
from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.attention.native import NativeAttention, why_not_native
from kelp.executor.torch.attention.trial import Factory, why_trial_fails
from kelp.executor.torch.attention.varlen import VarlenAttention, why_not_varlen
from kelp.executor.torch.staging import on_device

_log = logging.getLogger(__name__)

AUTO = "auto"
VARLEN, SPLIT_KV, NATIVE, GATHER = "varlen", "split-kv", "native", "gather"
CHOICES = (AUTO, VARLEN, SPLIT_KV, NATIVE, GATHER)
_BY_SPEED_ON_CUDA = (VARLEN, SPLIT_KV)


def choose_attention(pool: torch.Tensor, shape: AttentionShape, wanted: str) -> Attention:
    """A backend for `pool`, which must be allocated.

    Args:
        pool: As `attention.base` takes it.
        shape: The model's.
        wanted: One of `CHOICES`; anything but `auto` is taken or refused.

    Raises:
        ConfigError: The wanted backend cannot serve here; says why.
    """
    if wanted == GATHER:
        return GatherAttention(pool, shape)
    if wanted == NATIVE or not pool.is_cuda and wanted == AUTO:
        reason = why_not_native(pool, shape)
        if reason is not None and wanted == NATIVE:
            raise ConfigError(f"executor.attention: {wanted!r} cannot serve here: {reason}")
        return NativeAttention(pool, shape) if reason is None else GatherAttention(pool, shape)
    for name in _BY_SPEED_ON_CUDA if wanted == AUTO else (wanted,):
        factory = _factory(name, pool)
        if not isinstance(factory, str):
            with on_device(pool.device):
                reason = why_trial_fails(factory, pool, shape)
            if reason is None:
                _log.info("attention: %s", name)
                return factory(pool, shape)
        else:
            reason = factory
        if wanted != AUTO:
            raise ConfigError(f"executor.attention: {name!r} cannot serve here: {reason}")
        _log.info("attention: not %s: %s", name, reason)
    _log.warning("attention: gather, which copies all KV that a step reads; neither varlen nor split-kv can serve")
    return GatherAttention(pool, shape)


def _factory(name: str, pool: torch.Tensor) -> Factory | str:
    """What makes the backend, or why nothing does."""
    if name == VARLEN:
        return why_not_varlen(pool) or VarlenAttention
    try:
        # Only where it is wanted: the compiler takes a while to import and need not be there.
        module = importlib.import_module("kelp.executor.torch.attention.split_kv")
    except ImportError as error:
        return f"the package triton cannot be imported: {error}"
    if module.IS_COMPILED and not pool.is_cuda:
        return f"it needs a CUDA device, the pool is on {pool.device}"
    factory: Factory = module.SplitKVAttention
    return factory
