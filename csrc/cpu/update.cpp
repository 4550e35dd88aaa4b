// The operators `update_`, `row_sums` and `row_grads`: gradients to rows.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "results.h"
#include "rows.h"

namespace shardwise::cpu {
namespace {

const float* read_grad(const Tensor& grad) {
  if (grad.dtype() != DType::kFloat32 || !grad.is_contiguous() || grad.dim() != 2) {
    throw std::runtime_error("shardwise: the gradient must be float32 [rows, width], contiguous");
  }
  return grad.data<float>();
}

// The arguments of a rule, and what it keeps for each table.
struct RuleArguments {
  explicit RuleArguments(Arguments& arguments)
      : tables(arguments.tensors()),
        states(arguments.tensors()),
        steps(arguments.tensor()),
        slots(arguments.tensor()),
        code(static_cast<RuleCode>(arguments.integer())),
        settings(arguments.numbers()) {}

  void check() const {
    const int64_t count = static_cast<int64_t>(tables.size());
    if (code < RuleCode::kSgd || code >= RuleCode::kCount) {
      throw std::runtime_error("shardwise: unknown update rule");
    }
    if (settings.size() != 8) throw std::runtime_error("shardwise: a rule takes 8 settings");
    if (steps.numel() != count || slots.numel() != 4 * count ||
        static_cast<int64_t>(states.size()) != count * shape_of(code).num_states) {
      throw std::runtime_error("shardwise: steps, slots or states do not fit the tables");
    }
    for (size_t i = 0; i < states.size(); ++i) {
      const int64_t per_table = shape_of(code).num_states;
      const Tensor& table = tables[i / per_table];
      const bool is_per_row = shape_of(code).is_per_row[i % per_table];
      const int64_t wanted = is_per_row ? table.size(0) : table.numel();
      if (states[i].dtype() != DType::kFloat32 || states[i].numel() != wanted ||
          !states[i].is_contiguous()) {
        throw std::runtime_error("shardwise: state " + std::to_string(i) +
                                 " must be float32 of the shape that its rule keeps");
      }
    }
  }

  // By table, for the update after `steps` ones, with bits for stochastic rounding when `seed` >= 0.
  std::vector<RuleNumbers> numbers(float lr, int64_t seed) const {
    std::vector<RuleNumbers> result;
    for (size_t t = 0; t < tables.size(); ++t) result.push_back(numbers_of(t, lr, seed));
    return result;
  }
  RuleNumbers numbers_of(int64_t t, float lr, int64_t seed) const {
    const double step = static_cast<double>(steps.data<int64_t>()[t] + 1);
    const int64_t* slot = slots.data<int64_t>() + 4 * t;
    RuleNumbers k{};
    k.code = code;
    k.lr = lr;
    k.eps = static_cast<float>(settings[0]);
    k.beta1 = static_cast<float>(settings[1]);
    k.beta2 = static_cast<float>(settings[2]);
    k.momentum = static_cast<float>(settings[3]);
    k.eta = static_cast<float>(settings[4]);
    k.weight_decay = static_cast<float>(settings[5]);
    k.is_decoupled = settings[6] != 0;
    k.max_gradient = static_cast<float>(settings[7]);
    k.rest1 = static_cast<float>(1 - settings[1]);
    k.rest2 = static_cast<float>(1 - settings[2]);
    k.correction1 = static_cast<float>(1 - std::pow(settings[1], step));
    k.correction2 = static_cast<float>(1 - std::pow(settings[2], step));
    k.rounds_stochastically = seed >= 0;
    const auto word = [](int64_t x) { return static_cast<uint32_t>(x); };
    for (const uint32_t part : {word(seed), word(seed >> 32), word(steps.data<int64_t>()[t] + 1),
                                word(slot[0])}) {
      k.random_key = mix(k.random_key + part);
    }
    k.first_row = slot[1];
    k.first_column = slot[2];
    k.logical_width = static_cast<float>(slot[3]);
    return k;
  }

  void bind_states(int64_t t, RowRun* run) const {
    const int64_t count = shape_of(code).num_states;
    for (int64_t s = 0; s < count; ++s) {
      run->states[s] = states[t * count + s].mutable_data<float>();
    }
  }

  std::vector<Tensor> tables, states;
  Tensor steps, slots;
  RuleCode code;
  std::vector<double> settings;
};

int64_t num_rows(const std::vector<TouchedRows>& touched) {
  return touched.empty() ? 0 : touched.back().first_row + touched.back().count();
}

// Points the runs at what the rule keeps, and at the sums where they are given.
void bind_runs(const RuleArguments& rule, const Tensor& sums, std::vector<TouchedRows>* touched) {
  const int64_t per_row = shape_of(rule.code).num_sums;
  const bool is_given = per_row > 0 && sums.numel() > 0;
  if (is_given && sums.numel() != num_rows(*touched) * per_row) {
    throw std::runtime_error("shardwise: sums must be [touched rows, sums of the rule]");
  }
  for (size_t t = 0; t < touched->size(); ++t) {
    TouchedRows& table = (*touched)[t];
    rule.bind_states(t, &table.run);
    if (is_given) table.run.given_sums = sums.data<float>() + table.first_row * per_row;
  }
}

}  // namespace

void update_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor();
  Call call(arguments);
  const RuleArguments rule(arguments);
  const int64_t seed = arguments.integer();
  const Tensor lr = arguments.tensor(), sums = arguments.tensor();
  const float* gradient = read_grad(grad);
  rule.check();
  if (lr.numel() != 1 || lr.dtype() != DType::kFloat32) {
    throw std::runtime_error("shardwise: lr must be one float32 number");
  }
  call.lay_out(rule.tables, grad.size(0), grad.size(1));
  const std::vector<TableView> tables = view_tables(rule.tables);
  const auto numbers = rule.numbers(*lr.data<float>(), seed);
  if (sums.numel() > 0) {  // of ascending rows
    std::vector<TouchedRows> touched = group_rows(call, tables, gradient, grad.numel());
    bind_runs(rule, sums, &touched);
    for_each_piece(touched,
                   [&](int64_t t, const RowRun& run) { isa().update(run, numbers[t]); });
  } else {
    for_each_piece(call, tables, gradient, grad.numel(), [&](int64_t t, const RowRun& piece) {
      RowRun run = piece;
      rule.bind_states(t, &run);
      isa().update(run, numbers[t]);
    });
  }
  int64_t* steps = rule.steps.mutable_data<int64_t>();
  for (size_t t = 0; t < tables.size(); ++t) ++steps[t];
}

void row_sums(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor();
  Call call(arguments);
  const RuleArguments rule(arguments);
  const Tensor sums = arguments.tensor();
  const float* gradient = read_grad(grad);
  rule.check();
  call.lay_out(rule.tables, grad.size(0), grad.size(1));
  std::vector<TouchedRows> touched =
      group_rows(call, view_tables(rule.tables), gradient, grad.numel());
  bind_runs(rule, sums, &touched);
  const auto numbers = rule.numbers(0.0f, -1);
  const int64_t per_row = shape_of(rule.code).num_sums;
  Tensor result = Tensor::empty({num_rows(touched), per_row}, aoti_torch_dtype_float32());
  for (TouchedRows& table : touched) {
    table.run.out = result.mutable_data<float>() + table.first_row * per_row;
  }
  if (per_row > 0) {
    for_each_piece(touched,
                   [&](int64_t t, const RowRun& run) { isa().row_sums(run, numbers[t]); });
  }
  arguments.give(std::move(result));
}

void row_grads(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor();
  Call call(arguments);
  const std::vector<Tensor> tables = arguments.tensors();
  const float* gradient = read_grad(grad);
  call.lay_out(tables, grad.size(0), grad.size(1));
  const std::vector<TableView> views = view_tables(tables);
  std::vector<TouchedRows> touched = group_rows(call, views, gradient, grad.numel());
  int64_t numel = 0;
  for (const TouchedRows& table : touched) numel += table.count() * table.run.table.width;
  Tensor rows = Tensor::empty({num_rows(touched)}, aoti_torch_dtype_int64());
  Tensor grads = make_result({numel}, aoti_torch_dtype_float32());
  Tensor counts = Tensor::empty({static_cast<int64_t>(tables.size())}, aoti_torch_dtype_int64());
  float* out = grads.mutable_data<float>();
  for (TouchedRows& table : touched) {
    std::copy_n(table.run.rows, table.count(), rows.mutable_data<int64_t>() + table.first_row);
    counts.mutable_data<int64_t>()[&table - touched.data()] = table.count();
    table.run.out = out;
    out += table.count() * table.run.table.width;
  }
  for_each_piece(touched, [](int64_t, const RowRun& run) { isa().row_grads(run); });
  arguments.give(std::move(rows));
  arguments.give(std::move(grads));
  arguments.give(std::move(counts));
}

}  // namespace shardwise::cpu
