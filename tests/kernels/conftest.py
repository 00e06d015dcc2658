"""Triton's interpreter without work of its own that changes no result and was half of its time."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest


def _without_repeated_patches(interpreter) -> contextlib.AbstractContextManager:
    """Patches the language once a launch for the functions of a module.

    By itself the interpreter patches for the launch, and again at each call of a device function. What that changes
    depends on the function's globals alone, so the second time for the same ones sets what is set already. Only the
    launch's scope is restored, when it ends; from then on nothing counts as patched.
    """
    patch_lang, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[int] = set()

    def patch_once(fn):
        where = id(fn.__globals__)
        if where in patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        patched.add(where)
        return scope

    def restore_all(scope) -> None:
        patched.clear()
        restore(scope)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(interpreter, "_patch_lang", patch_once))
    stack.enter_context(mock.patch.object(interpreter._LangPatchScope, "restore", restore_all))
    return stack


def _without_unused_checks(interpreter) -> contextlib.AbstractContextManager:
    """No overflow checks where nobody is told of them.

    `sanitize_overflow` computes every sum and product of integers once more in 64 bits, for an assertion that is made
    under `debug` only.
    """
    builder = interpreter.interpreter_builder
    checked = builder.options.sanitize_overflow and builder.options.debug
    return mock.patch.object(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=checked))


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """In force under TRITON_INTERPRET=1, for versions of triton whose interpreter was read."""
    from fusedlora.kernels import launch

    if not (launch.INTERPRET and launch._READ):
        yield
        return
    from triton.runtime import interpreter

    with _without_repeated_patches(interpreter), _without_unused_checks(interpreter):
        yield
