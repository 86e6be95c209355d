// Forgets the macros of lanes.h, so that the next instruction set can define its own.
#undef LANES_INLINE
#undef LANES_TARGET
#undef LANES_BYTES
