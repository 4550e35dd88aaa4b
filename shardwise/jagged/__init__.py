"""Sparse input and dense output of embedding tables: bags of ids by key, and columns by key."""

from shardwise.jagged.convert import (
    ComputeJTDictToKJT,
    ComputeKJTToJTDict,
    flatten_kjt_list,
    jt_is_equal,
    kjt_is_equal,
    maybe_td_to_kjt,
    unflatten_kjt_list,
    validate_keyed_jagged_tensor,
)
from shardwise.jagged.jagged_tensor import JaggedTensor
from shardwise.jagged.keyed_jagged_tensor import KeyedJaggedTensor
from shardwise.jagged.keyed_tensor import KeyedTensor, regroup_kts
from shardwise.jagged.streamable import Multistreamable, Pipelineable

__all__ = [
    "ComputeJTDictToKJT",
    "ComputeKJTToJTDict",
    "JaggedTensor",
    "KeyedJaggedTensor",
    "KeyedTensor",
    "Multistreamable",
    "Pipelineable",
    "flatten_kjt_list",
    "jt_is_equal",
    "kjt_is_equal",
    "maybe_td_to_kjt",
    "regroup_kts",
    "unflatten_kjt_list",
    "validate_keyed_jagged_tensor",
]
