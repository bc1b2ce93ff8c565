#include "kdkernels/svd.h"

#include "lane_io.h"
#include "spectrum.h"

namespace kd::KD_ISA {
namespace {

// A lane group's decomposition and room for U.
template <class N>
struct Room {
  Workspace<ScalarOf<N>> memory;
  Decomposition<N> svd;
  N* left;

  explicit Room(const Svd& call, Vector<ScalarOf<N>>* vectors = nullptr)
      : memory(vectors),
        svd(call.rows, call.cols, bool(call.left), memory),
        left(memory.template take<N>(call.left ? call.rows * call.cols : 0)) {}
};

template <class N>
void decompose_group(const Svd& call, int64_t index, const Schedule& schedule, Vector<ScalarOf<N>>* memory) {
  using T = ScalarOf<N>;
  using V = Vector<T>;
  const int64_t rows = call.rows, cols = call.cols;
  const bool with_vectors = bool(call.left);
  Room<N> room(call, memory);
  Decomposition<N>& svd = room.svd;
  read_columns(Group<T>(call.matrices, index), rows, cols, svd.M, rows);
  const Mask<T> bad = not_finite(svd.M, rows * cols);
  const V inverse_scale = 1 / normalise(svd.M, rows * cols, bad, Format<T>::lift);
  const bool arranged = svd.arrange();
  svd.decompose(schedule, with_vectors);
  if (with_vectors) {
    svd.complete_right();
    svd.left_vectors(room.left, rows);
  }
  svd.sort();
  Group<T>(call.values, index).write(0, cols, [&](int64_t k) {
    return bad ? broadcast<T>(static_cast<T>(__builtin_nan(""))) : svd.values[k] * inverse_scale;
  });
  if (!with_vectors) return;
  svd.reorder(room.left, rows, rows);
  svd.reorder(svd.X, cols, svd.stride_X);
  if (arranged) svd.restore();
  write_columns(Group<T>(call.left, index), rows, cols, room.left, rows, bad);
  const Group<T> right(call.right, index);
  call.right_adjoint ? write_adjoint(right, cols, cols, svd.X, svd.stride_X, bad)
                     : write_columns(right, cols, cols, svd.X, svd.stride_X, bad);
}

template <class N>
void decompose_all(const Svd& call, int threads) {
  using T = ScalarOf<N>;
  const int64_t rows = call.rows, cols = call.cols, batch = call.matrices.rows;
  if (batch == 0 || cols == 0) return;
  const bool with_vectors = bool(call.left);
  threads = useful_threads(threads, batch * cols * cols * (rows + 10 * cols));
  const int64_t room = round_up(Room<N>(call).memory.vectors(), 64);
  const Schedule schedule = Decomposition<N>::schedule(cols, with_vectors);
  const Buffer<Vector<T>> rooms(threads * room);
  parallel_for(threads, ceil_div(batch, kLanes<T>), [&](int64_t index, int worker) {
    decompose_group<N>(call, index, schedule, rooms.get() + worker * room);
  });
}

}  // namespace

extern const SvdKernels svd;
const SvdKernels svd = {
    [](const Svd& call, int threads) {
      const bool wide = call.matrices.dtype == DType::float64;
      if (call.is_complex)
        wide ? decompose_all<Complex<double>>(call, threads) : decompose_all<Complex<float>>(call, threads);
      else
        wide ? decompose_all<Real<double>>(call, threads) : decompose_all<Real<float>>(call, threads);
    },
};

}  // namespace kd::KD_ISA
