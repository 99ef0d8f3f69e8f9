// The parts of ONNX Runtime's and the CUDA driver's C interfaces that operators.c uses.
//
// Their headers are not in the packages that a user installs, so the few members of ONNX Runtime's tables that are
// needed are declared by their place, which is part of its stable ABI: tables only grow at their ends.
#pragma once

#include <stddef.h>
#include <stdint.h>

// ---- ONNX Runtime's C API, from version 17 of onnxruntime_c_api.h ----

enum { API_VERSION = 17, INVALID_ARGUMENT = 2, EP_FAIL = 11 };
enum { FLOAT = 1, INT32 = 6, FLOAT16 = 10, ANY_TYPE = 0 };
enum { OPTIONAL = 1, VARIADIC = 2 };

typedef struct Status Status;
typedef struct Value Value;
typedef struct Shape Shape;
typedef struct KernelInfo KernelInfo;
typedef struct Context Context;
typedef struct Domain Domain;
typedef struct Options Options;
typedef struct { void *members[194]; } Api; // it has more
typedef struct { const Api *(*get_api)(uint32_t version); const char *(*get_version)(void); } ApiBase;

typedef Status *CreateStatus(int code, const char *message);
typedef Status *CreateCustomOpDomain(const char *name, Domain **out);
typedef Status *CustomOpDomainAdd(Domain *domain, const void *op);
typedef Status *AddCustomOpDomain(Options *options, Domain *domain);
typedef Status *GetTensorMutableData(Value *value, void **out);
typedef Status *GetAttributeInt64(const KernelInfo *info, const char *name, int64_t *out);
typedef Status *GetAttributeString(const KernelInfo *info, const char *name, char *out, size_t *size);
typedef Status *GetAttributeArray(const KernelInfo *info, const char *name, int64_t *out, size_t *size);
typedef Status *GetCount(const Context *context, size_t *out);
typedef Status *GetInput(const Context *context, size_t index, const Value **out);
typedef Status *GetOutput(Context *context, size_t index, const int64_t *dims, size_t rank, Value **out);
typedef Status *GetTensorShape(const Value *value, Shape **out); // and the type
typedef Status *GetRank(const Shape *shape, size_t *out);
typedef Status *GetSizes(const Shape *shape, int64_t *out, size_t rank);
typedef void ReleaseShape(Shape *shape);
typedef Status *GetComputeStream(const Context *context, void **out);
typedef void ReleaseStatus(Status *status);

#define MEMBER(api, type, place) ((type *)(api)->members[place])
#define CREATE_STATUS(api) MEMBER(api, CreateStatus, 0)
#define CREATE_CUSTOM_OP_DOMAIN(api) MEMBER(api, CreateCustomOpDomain, 26)
#define CUSTOM_OP_DOMAIN_ADD(api) MEMBER(api, CustomOpDomainAdd, 27)
#define ADD_CUSTOM_OP_DOMAIN(api) MEMBER(api, AddCustomOpDomain, 28)
#define GET_TENSOR_MUTABLE_DATA(api) MEMBER(api, GetTensorMutableData, 51)
#define GET_RANK(api) MEMBER(api, GetRank, 61)
#define GET_SIZES(api) MEMBER(api, GetSizes, 62)
#define GET_TENSOR_SHAPE(api) MEMBER(api, GetTensorShape, 65)
#define GET_ATTRIBUTE_INT64(api) MEMBER(api, GetAttributeInt64, 86)
#define GET_ATTRIBUTE_STRING(api) MEMBER(api, GetAttributeString, 87)
#define GET_INPUT_COUNT(api) MEMBER(api, GetCount, 88)
#define GET_INPUT(api) MEMBER(api, GetInput, 90)
#define GET_OUTPUT(api) MEMBER(api, GetOutput, 91)
#define RELEASE_STATUS(api) MEMBER(api, ReleaseStatus, 93)
#define RELEASE_SHAPE(api) MEMBER(api, ReleaseShape, 99)
#define GET_ATTRIBUTE_ARRAY_INT64(api) MEMBER(api, GetAttributeArray, 163)
#define GET_GPU_COMPUTE_STREAM(api) MEMBER(api, GetComputeStream, 193)

// OrtCustomOp, as far as it is read from an operator of version 17.
typedef struct CustomOp {
    uint32_t version;
    void *create_kernel_v1;
    const char *(*get_name)(const struct CustomOp *op);
    const char *(*get_execution_provider_type)(const struct CustomOp *op);
    int (*get_input_type)(const struct CustomOp *op, size_t index);
    size_t (*get_input_type_count)(const struct CustomOp *op);
    int (*get_output_type)(const struct CustomOp *op, size_t index);
    size_t (*get_output_type_count)(const struct CustomOp *op);
    void *compute_v1;
    void (*destroy)(void *kernel);
    int (*get_input_characteristic)(const struct CustomOp *op, size_t index);
    int (*get_output_characteristic)(const struct CustomOp *op, size_t index);
    int (*get_input_memory_type)(const struct CustomOp *op, size_t index);
    int (*get_variadic_input_min_arity)(const struct CustomOp *op);
    int (*get_variadic_input_homogeneity)(const struct CustomOp *op);
    int (*get_variadic_output_min_arity)(const struct CustomOp *op);
    int (*get_variadic_output_homogeneity)(const struct CustomOp *op);
    Status *(*create_kernel)(const struct CustomOp *op, const Api *api, const KernelInfo *info, void **kernel);
    Status *(*compute)(void *kernel, Context *context);
    void *infer_output_shape;
    int (*get_start_version)(const struct CustomOp *op);
    int (*get_end_version)(const struct CustomOp *op);
} CustomOp;

// ---- The CUDA driver's launch functions ----

typedef int LaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **arguments,
                         void **extra);
typedef int GetErrorString(int code, const char **text);

enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6 }; // of CUlaunchAttributeID
typedef struct { int id; char padding[4]; union { int allowed; char bytes[64]; } value; } LaunchAttribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    LaunchAttribute *attributes;
    unsigned attribute_count;
} LaunchConfig;
typedef int LaunchKernelEx(const LaunchConfig *config, void *function, void **arguments, void **extra);

// ---- A node that calls a function on the host instead ----

// `values`: addresses of inputs, outputs and pointers; `rows`: all dimensions but the last of the first input, multiplied;
// `length`: its last dimension but one.
// Returns null, or what is wrong, which stays valid until the next call.
typedef const char *HostFunction(int64_t rows, int64_t length, void **values);
