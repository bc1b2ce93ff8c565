// Runs the CUDA kernels, compiled for the CPU, on what it reads from standard input, and writes the results.
//   driver svd    dtype complex shared_limit batch rows cols vectors
//   driver hankel dtype complex shared_limit batch n m p all
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kdkernels/cuda.h"
#include "launch.h"

namespace {

using Bytes = std::vector<unsigned char>;

Bytes read(int64_t size) {
  Bytes bytes(static_cast<size_t>(size));
  if (size > 0 && std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) std::exit(3);
  return bytes;
}

Bytes unwritten(int64_t size) {
  return Bytes(static_cast<size_t>(size), 0xff);
}

void write(const Bytes& bytes) {
  if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 9 && argc != 10) return 2;
  const auto number = [&](int i) { return static_cast<int64_t>(std::atoll(argv[i])); };
  const auto dtype = argv[2] == std::string("float32") ? kd::DType::float32 : kd::DType::float64;
  const bool is_complex = number(3) != 0;
  const int64_t real = kd::size_of(dtype), element = real * (is_complex ? 2 : 1);
  if (number(4)) kd::host_shared_limit = static_cast<size_t>(number(4));

  if (argv[1] == std::string("svd")) {
    kd::CudaSvd call{dtype, is_complex, number(5), number(6), number(7)};
    const bool vectors = number(8) != 0;
    const Bytes matrices = read(call.batch * call.rows * call.cols * element);
    Bytes values = unwritten(call.batch * call.cols * real);
    Bytes left = unwritten(vectors * call.batch * call.rows * call.cols * element);
    Bytes right = unwritten(vectors * call.batch * call.cols * call.cols * element);
    call.matrices = matrices.data(), call.values = values.data();
    if (vectors) call.left = left.data(), call.right = right.data();
    Bytes workspace = unwritten(kd::cuda_svd_workspace(call));
    kd::cuda_svd(call, workspace.empty() ? nullptr : workspace.data(), nullptr);
    for (const Bytes& result : {values, left, right}) write(result);
    return 0;
  }

  kd::CudaHankel call{dtype, is_complex, number(5), number(6), number(7), number(8)};
  const bool all = number(9) != 0;
  const int64_t n = call.n, square = call.batch * n * n * element;
  const Bytes Lambda = read(call.batch * n * element), B = read(call.batch * n * call.m * element),
              C = read(call.batch * call.p * n * element);
  Bytes factor_c = unwritten(all * square), factor_o = factor_c, T = factor_c, W = factor_c;
  Bytes residual_c = unwritten(all * call.batch * (n + 1) * real), residual_o = residual_c;
  Bytes values = unwritten(call.batch * n * real);
  call.Lambda = Lambda.data(), call.B = B.data(), call.C = C.data(), call.values = values.data();
  if (all) {
    call.factor_c = factor_c.data(), call.factor_o = factor_o.data(), call.T = T.data(), call.W = W.data();
    call.residual_c = residual_c.data(), call.residual_o = residual_o.data();
  }
  Bytes workspace = unwritten(kd::cuda_hankel_workspace(call));
  kd::cuda_hankel(call, workspace.empty() ? nullptr : workspace.data(), nullptr);
  for (const Bytes& result : {values, factor_c, factor_o, residual_c, residual_o, T, W}) write(result);
  return 0;
}
