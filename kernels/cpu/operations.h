// What is done to registers: the reductions, and what may follow them. Included after lanes.h, once per instruction
// set.

struct Sum {
  template <class V>
  LANES_INLINE V apply(V a, V b) {
    return a + b;
  }
};
struct Prod {
  template <class V>
  LANES_INLINE V apply(V a, V b) {
    return a * b;
  }
};
// A NaN in a passes the second test, a NaN in b fails both: NaN wins either way.
struct Min {
  template <class V>
  LANES_INLINE V apply(V a, V b) {
    return ((a < b) | (a != a)) ? a : b;
  }
};
struct Max {
  template <class V>
  LANES_INLINE V apply(V a, V b) {
    return ((a > b) | (a != a)) ? a : b;
  }
};

struct Keep {
  template <class V>
  LANES_INLINE V apply(V a, double) {
    return a;
  }
};
struct Times {
  template <class V>
  LANES_INLINE V apply(V a, double factor) {
    return a * (decltype(a[0] + a[0]))factor;
  }
};
struct Over {
  template <class V>
  LANES_INLINE V apply(V a, double divisor) {
    return a / (decltype(a[0] + a[0]))divisor;
  }
};
