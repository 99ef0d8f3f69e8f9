// Operators of ONNX Runtime that launch one kernel each: Launch_<types of the outputs>, e.g. Launch_hf.
// With the attribute `rows` the grid and the shapes depend on the first input; with `host` a function on the host is
// called instead.
//
// Compiled at first use (see operators.py).
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

// ---- The operators: one for each way to type 1 to 4 outputs ----

enum { TYPES = 3, MOST_OUTPUTS = 4, SIGNATURES = 3 + 9 + 27 + 81, MOST_ARGUMENTS = 256, MOST_ABSENT = 63 };
enum { MOST_RANK = 8 };
static const char TYPE_LETTERS[TYPES + 1] = "hfi";
static const int TYPE_CODES[TYPES] = {FLOAT16, FLOAT, INT32};

// Where the operators of one execution provider run, and how.
typedef struct Launcher {
    char provider[64];
    LaunchKernel *launch;
    LaunchKernelEx *launch_ex; // null: launches never overlap
    GetErrorString *error_string;
    const Api *api;
    Domain *domain;
    struct Operator *operators;
} Launcher;

typedef struct Operator {
    CustomOp table; // first, because ONNX Runtime hands this back
    Launcher *launcher;
    int outputs;
    int types[MOST_OUTPUTS];
    char name[16];
} Operator;

static Launcher launchers[2];
static Launcher *chosen; // by configure, for the next registration

typedef struct {
    const Launcher *launcher;
    void *function;
    unsigned grid[3], block[3], shared;
    int overlap, host, outputs;
    size_t pointer_count;
    uint64_t absent; // a bit for each input that is a null pointer; ONNX Runtime's variadic inputs are all there
    char kernel[64];
    int64_t rows; // of the first input, for each block along x; 0: the grid does not depend on it
    int64_t ranks[MOST_OUTPUTS];
    int64_t *shapes[MOST_OUTPUTS];
    void **pointers;
    int64_t *storage; // of shapes and pointers
} Kernel;

static Status *failed(const Api *api, int code, const char *kernel, const char *reason) {
    char message[512];
    snprintf(message, sizeof message, "%s: %s", kernel, reason);
    return CREATE_STATUS(api)(code, message);
}

// An attribute's numbers, to be freed; none where it is absent.
static int64_t *numbers(const Api *api, const KernelInfo *info, const char *name, size_t *count) {
    *count = 0;
    Status *status = GET_ATTRIBUTE_ARRAY_INT64(api)(info, name, NULL, count);
    if (status) *count = 0;
    int64_t *values = calloc(*count + 1, sizeof *values);
    if (status) {
        RELEASE_STATUS(api)(status);
    } else if (values && *count) {
        status = GET_ATTRIBUTE_ARRAY_INT64(api)(info, name, values, count);
        if (status) {
            RELEASE_STATUS(api)(status);
            *count = 0;
        }
    }
    return values;
}

static int64_t number(const Api *api, const KernelInfo *info, const char *name) {
    int64_t value = 0;
    Status *status = GET_ATTRIBUTE_INT64(api)(info, name, &value);
    if (!status) return value;
    RELEASE_STATUS(api)(status);
    return 0;
}

static int sizes_of(const Api *api, const KernelInfo *info, const char *name, unsigned sizes[3]) {
    size_t count;
    int64_t *values = numbers(api, info, name, &count);
    int valid = values && count == 3;
    for (int i = 0; valid && i < 3; ++i) {
        valid = values[i] > 0 && values[i] <= 0x7fffffff;
        sizes[i] = (unsigned)values[i];
    }
    free(values);
    return valid;
}

static void destroy(void *kernel) {
    free(((Kernel *)kernel)->storage);
    free(kernel);
}

// Reads the node's attributes; returns what is wrong with them, or null.
static const char *read_attributes(const Api *api, const KernelInfo *info, Kernel *kernel) {
    kernel->function = (void *)(intptr_t)number(api, info, "function");
    if (!kernel->function) return "the attribute function is missing";
    if (!sizes_of(api, info, "grid", kernel->grid)) return "the attribute grid must be three positive numbers";
    if (!sizes_of(api, info, "block", kernel->block)) return "the attribute block must be three positive numbers";
    kernel->shared = (unsigned)number(api, info, "shared");
    kernel->overlap = number(api, info, "overlap") != 0;
    kernel->host = number(api, info, "host") != 0;
    kernel->rows = number(api, info, "rows");
    if (kernel->rows < 0 || (kernel->host && !kernel->rows)) return "the attribute rows must be positive";
    kernel->absent = (uint64_t)number(api, info, "absent");

    size_t rank_count, shape_count;
    int64_t *ranks = numbers(api, info, "ranks", &rank_count), *shapes = numbers(api, info, "shapes", &shape_count);
    int64_t *pointers = numbers(api, info, "pointers", &kernel->pointer_count);
    int64_t total = 0;
    const char *wrong = NULL;
    if (!ranks || !shapes || !pointers) {
        wrong = "no memory";
    } else if (rank_count != (size_t)kernel->outputs) {
        wrong = "the attribute ranks must have a number for each output";
    } else if (!(kernel->storage = calloc(shape_count + kernel->pointer_count + 1, sizeof(int64_t)))) {
        wrong = "no memory";
    } else {
        memcpy(kernel->storage, shapes, shape_count * sizeof(int64_t));
        memcpy(kernel->storage + shape_count, pointers, kernel->pointer_count * sizeof(int64_t));
        kernel->pointers = (void **)(kernel->storage + shape_count);
        for (int i = 0; i < kernel->outputs; ++i) {
            kernel->ranks[i] = ranks[i];
            kernel->shapes[i] = kernel->storage + total;
            total += ranks[i] < 0 ? (int64_t)shape_count + 1 : ranks[i];
        }
        for (int i = 0; i < kernel->outputs; ++i)
            if (kernel->rows && ranks[i] > MOST_RANK) wrong = "too many dimensions";
        if (total != (int64_t)shape_count) wrong = "the attributes shapes and ranks do not fit";
    }
    free(ranks);
    free(shapes);
    free(pointers);
    return wrong;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
    const Operator *operator= (const Operator *)op;
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return CREATE_STATUS(api)(EP_FAIL, "no memory");
    kernel->launcher = operator->launcher;
    kernel->outputs = operator->outputs;
    size_t size = sizeof kernel->kernel;
    Status *status = GET_ATTRIBUTE_STRING(api)(info, "kernel", kernel->kernel, &size);
    if (status) {
        RELEASE_STATUS(api)(status);
        snprintf(kernel->kernel, sizeof kernel->kernel, "%s", operator->name);
    }
    const char *wrong = read_attributes(api, info, kernel);
    if (wrong) {
        status = failed(api, INVALID_ARGUMENT, kernel->kernel, wrong);
        destroy(kernel);
        return status;
    }
    *out = kernel;
    return NULL;
}

// Of the first input: its dimensions, all but the last multiplied, and the last but one.
typedef struct {
    int64_t sizes[MOST_RANK], rows, length;
} Extent;

static Status *extent_of(const Kernel *kernel, const Value *value, Extent *extent) {
    const Api *api = kernel->launcher->api;
    Shape *shape = NULL;
    size_t rank = 0;
    Status *status = GET_TENSOR_SHAPE(api)(value, &shape);
    if (status) return status;
    status = GET_RANK(api)(shape, &rank);
    if (!status && (rank < 2 || rank > MOST_RANK))
        status = failed(api, INVALID_ARGUMENT, kernel->kernel, "the first input must have 2 to 8 dimensions");
    if (!status) status = GET_SIZES(api)(shape, extent->sizes, rank);
    RELEASE_SHAPE(api)(shape);
    if (status) return status;
    extent->rows = 1;
    for (size_t i = 0; i + 1 < rank; ++i) extent->rows *= extent->sizes[i];
    extent->length = extent->sizes[rank - 2];
    return NULL;
}

// Gathers the addresses of inputs, outputs and constants, in this order; an absent one is null.
// Where the grid depends on the first input, outputs' sizes that are 0 are its.
static Status *gather(const Kernel *kernel, Context *context, void **values, size_t *count, Extent *extent) {
    const Api *api = kernel->launcher->api;
    size_t inputs = 0;
    Status *status = GET_INPUT_COUNT(api)(context, &inputs);
    if (status) return status;
    if (inputs + MOST_ABSENT + kernel->outputs + kernel->pointer_count + 2 > MOST_ARGUMENTS)
        return failed(api, INVALID_ARGUMENT, kernel->kernel, "too many arguments");
    for (size_t i = 0; i < inputs || (*count < MOST_ABSENT && kernel->absent >> *count); ++*count) {
        values[*count] = NULL;
        if (*count < MOST_ABSENT && kernel->absent >> *count & 1) continue;
        const Value *value = NULL;
        if ((status = GET_INPUT(api)(context, i++, &value))) return status;
        if (i == 1 && kernel->rows && (status = extent_of(kernel, value, extent))) return status;
        if ((status = GET_TENSOR_MUTABLE_DATA(api)((Value *)value, &values[*count]))) return status;
    }
    for (int i = 0; i < kernel->outputs; ++i) {
        Value *value = NULL;
        void **data = &values[(*count)++];
        *data = NULL;
        const int64_t *shape = kernel->shapes[i];
        int64_t sizes[MOST_RANK];
        for (int64_t j = 0; kernel->rows && j < kernel->ranks[i]; ++j) sizes[j] = shape[j] ? shape[j] : extent->sizes[j];
        if (kernel->rows) shape = sizes;
        if ((status = GET_OUTPUT(api)(context, i, shape, kernel->ranks[i], &value))) return status;
        if (value && (status = GET_TENSOR_MUTABLE_DATA(api)(value, data))) return status;
    }
    for (size_t i = 0; i < kernel->pointer_count; ++i) values[(*count)++] = kernel->pointers[i];
    return NULL;
}

static Status *compute(void *opaque, Context *context) {
    const Kernel *kernel = opaque;
    const Launcher *launcher = kernel->launcher;
    void *values[MOST_ARGUMENTS], *arguments[MOST_ARGUMENTS + 1], *stream = NULL;
    size_t count = 0;
    Extent extent = {{0}, 0, 0};
    Status *status = gather(kernel, context, values, &count, &extent);
    if (status) return status;
    if (kernel->host) {
        const char *wrong = ((HostFunction *)kernel->function)(extent.rows, extent.length, values);
        return wrong ? failed(launcher->api, EP_FAIL, kernel->kernel, wrong) : NULL;
    }
    unsigned grid[3] = {kernel->grid[0], kernel->grid[1], kernel->grid[2]};
    if (kernel->rows) {
        if (extent.rows == 0) return NULL;
        grid[0] = (unsigned)((extent.rows + kernel->rows - 1) / kernel->rows);
        values[count++] = (void *)(intptr_t)extent.rows;
        values[count++] = (void *)(intptr_t)extent.length;
    }
    for (size_t i = 0; i < count; ++i) arguments[i] = &values[i];
    arguments[count] = NULL; // tells the launcher of the tests how many there are
    if (strcmp(launcher->provider, "CPUExecutionProvider") != 0) {
        status = GET_GPU_COMPUTE_STREAM(launcher->api)(context, &stream);
        if (status) return status;
    }
    const unsigned *block = kernel->block;
    int code;
    if (kernel->overlap && launcher->launch_ex) {
        LaunchAttribute attribute = {PROGRAMMATIC_STREAM_SERIALIZATION, {0}, {1}};
        LaunchConfig config = {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, kernel->shared, stream,
                               &attribute, 1};
        code = launcher->launch_ex(&config, kernel->function, arguments, NULL);
    } else {
        code = launcher->launch(kernel->function, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                                kernel->shared, stream, arguments, NULL);
    }
    if (code == 0) return NULL;
    const char *reason = NULL;
    if (launcher->error_string) launcher->error_string(code, &reason);
    char message[400];
    snprintf(message, sizeof message, "the launch failed with %d (%s)", code, reason ? reason : "no reason given");
    return failed(launcher->api, EP_FAIL, kernel->kernel, message);
}

static const char *get_name(const CustomOp *op) { return ((const Operator *)op)->name; }
static const char *get_provider(const CustomOp *op) { return ((const Operator *)op)->launcher->provider; }
static int get_input_type(const CustomOp *op, size_t index) { return (void)op, (void)index, ANY_TYPE; }
static size_t get_input_count(const CustomOp *op) { return (void)op, 1; }
static int get_output_type(const CustomOp *op, size_t index) { return ((const Operator *)op)->types[index]; }
static size_t get_output_count(const CustomOp *op) { return ((const Operator *)op)->outputs; }
static int get_input_characteristic(const CustomOp *op, size_t index) { return (void)op, (void)index, VARIADIC; }
static int get_output_characteristic(const CustomOp *op, size_t index) { return (void)op, (void)index, OPTIONAL; }
static int get_memory_type(const CustomOp *op, size_t index) { return (void)op, (void)index, 0; }
static int one(const CustomOp *op) { return (void)op, 1; }
static int zero(const CustomOp *op) { return (void)op, 0; }
static int most(const CustomOp *op) { return (void)op, 0x7fffffff; }

static void describe(Operator *operator, Launcher *launcher, int outputs, int index) {
    operator->table = (CustomOp){
        .version = API_VERSION,
        .get_name = get_name,
        .get_execution_provider_type = get_provider,
        .get_input_type = get_input_type,
        .get_input_type_count = get_input_count,
        .get_output_type = get_output_type,
        .get_output_type_count = get_output_count,
        .destroy = destroy,
        .get_input_characteristic = get_input_characteristic,
        .get_output_characteristic = get_output_characteristic,
        .get_input_memory_type = get_memory_type,
        .get_variadic_input_min_arity = one,
        .get_variadic_input_homogeneity = zero,
        .get_variadic_output_min_arity = one,
        .get_variadic_output_homogeneity = zero,
        .create_kernel = create_kernel,
        .compute = compute,
        .get_start_version = one,
        .get_end_version = most,
    };
    operator->launcher = launcher;
    operator->outputs = outputs;
    char *name = operator->name + sprintf(operator->name, "Launch_");
    for (int i = 0; i < outputs; ++i, index /= TYPES) {
        operator->types[i] = TYPE_CODES[index % TYPES];
        *name++ = TYPE_LETTERS[index % TYPES];
    }
    *name = 0;
}

// Says where and how the operators run that the next RegisterCustomOps registers. `launch` is cuLaunchKernel or has its
// shape, `launch_ex` (or null) likewise for cuLaunchKernelEx, and `error_string` (or null) for cuGetErrorString.
// Returns 0, or 1 for a third provider.
EXPORTED int lsp_agent_configure(const char *provider, void *launch, void *launch_ex, void *error_string) {
    for (int i = 0; i < 2; ++i) {
        Launcher *launcher = &launchers[i];
        if (launcher->provider[0] && strcmp(launcher->provider, provider) != 0) continue;
        snprintf(launcher->provider, sizeof launcher->provider, "%s", provider);
        launcher->launch = (LaunchKernel *)launch;
        launcher->launch_ex = (LaunchKernelEx *)launch_ex;
        launcher->error_string = (GetErrorString *)error_string;
        chosen = launcher;
        return 0;
    }
    return 1;
}

// What ONNX Runtime calls when the library is registered with a session's options.
EXPORTED Status *RegisterCustomOps(Options *options, const ApiBase *base) {
    const Api *api = base->get_api(API_VERSION);
    if (!api) return NULL; // never: no version that this project runs on is that old
    Launcher *launcher = chosen;
    if (!launcher) return CREATE_STATUS(api)(INVALID_ARGUMENT, "lsp_agent_configure has not been called");
    if (!launcher->domain) {
        Domain *domain = NULL;
        Status *status = CREATE_CUSTOM_OP_DOMAIN(api)("lsp_agent", &domain);
        if (status) return status;
        launcher->operators = calloc(SIGNATURES, sizeof *launcher->operators);
        if (!launcher->operators) return CREATE_STATUS(api)(EP_FAIL, "no memory");
        Operator *operator= launcher->operators;
        for (int outputs = 1, count = TYPES; outputs <= MOST_OUTPUTS; ++outputs, count *= TYPES)
            for (int index = 0; index < count; ++index, ++operator) {
                describe(operator, launcher, outputs, index);
                if ((status = CUSTOM_OP_DOMAIN_ADD(api)(domain, operator))) return status;
            }
        launcher->api = api;
        launcher->domain = domain;
    }
    return ADD_CUSTOM_OP_DOMAIN(api)(options, launcher->domain);
}
