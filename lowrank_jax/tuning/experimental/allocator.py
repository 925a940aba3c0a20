"""Freed memory that the process keeps: the arrays of the next run do not wait for new pages."""

from lowrank_jax.io.c_library import c_library

# Of mallopt(3): the name as an environment variable to the number and the value.
SETTINGS = {
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_ARENA_MAX": (-8, 1),
}


def keep_memory() -> bool:
    """Lets the C library's allocator keep freed memory, for the whole process and until it ends.

    The GNU allocator maps arrays of more than 32 MiB anew each time, and in threads every array of
    more than 64 MiB. It also gives free memory at the end of its heap back. A network on the CPU
    that meets either case pays for fresh, zeroed pages in every run. Whether smaller arrays cost
    this, too, depends on what else the process holds. Call this once, before JAX computes anything:
    then nothing is mapped, nothing given back but by `compress`, and threads share one heap. The
    process may grow to three times the memory that it held without this call.

    Returns:
        Whether the C library has these settings and took them. On macOS, on Windows and with musl
        it is False, and nothing has changed. Arrays on a GPU or TPU are not concerned.

    Example:
        >>> import lowrank_jax as lr
        >>> kept = lr.keep_memory()
    """
    library = c_library()
    if not (hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")):
        return False
    return all(library.mallopt(setting, value) for setting, value in SETTINGS.values())
