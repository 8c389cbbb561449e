/* pykd's engine for C programs: load a model file, plan it for a batch size, run it.
 *
 *   pykd_model* model;
 *   pykd_plan* plan;
 *   if (pykd_model_load("student.pykd.safetensors", &model) != PYKD_OK) return puts(pykd_last_error());
 *   pykd_plan_options options = PYKD_PLAN_OPTIONS;
 *   if (pykd_plan_create(model, &options, &plan) != PYKD_OK) return puts(pykd_last_error());
 *   pykd_plan_run(plan, image, inputs, answer, outputs); // how many numbers each holds
 *   pykd_plan_free(plan);
 *   pykd_model_free(model);
 *
 * A model may be used by any number of threads at the same time, a plan by one at a time; threads that run at the same
 * time have a plan each. A plan keeps what it needs of its model: the model may be freed first. pykd_plan_run allocates
 * nothing. A process that forks makes its plans anew, on CUDA only where its parent made none there. Numbers are the
 * host's, little-endian.
 */
#ifndef PYKD_H
#define PYKD_H

#include <stddef.h>
#include <stdint.h>

#define PYKD_VERSION "0.1.0"

#if defined(__GNUC__)
#define PYKD_API __attribute__((visibility("default")))
#else
#define PYKD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pykd_status {
  PYKD_OK = 0,
  PYKD_ERROR_ARGUMENT = 1, /* a null pointer, a size that does not fit, an option out of range */
  PYKD_ERROR_FILE = 2,     /* a file that cannot be read, or is no model file */
  PYKD_ERROR_MEMORY = 3,   /* not enough memory */
  PYKD_ERROR_SYSTEM = 4    /* the system refused something else, such as a thread or a CUDA device */
} pykd_status;

typedef enum pykd_device { PYKD_CPU = 0, PYKD_CUDA = 1 } pykd_device;
typedef enum pykd_precision { PYKD_FLOAT32 = 0, PYKD_FLOAT16 = 1, PYKD_BFLOAT16 = 2 } pykd_precision;

typedef struct pykd_model pykd_model;
typedef struct pykd_plan pykd_plan;

/* The library's version, which may differ from PYKD_VERSION, that of this header. */
PYKD_API const char* pykd_version(void);

/* What went wrong in this thread's last call that returned another status than PYKD_OK: a sentence, "" before the
 * first. It stays until the next such call. */
PYKD_API const char* pykd_last_error(void);

/* A model file. On success *model is to be freed by pykd_model_free, otherwise it is null. The file, or the bytes, are
 * no longer needed afterwards. */
PYKD_API pykd_status pykd_model_load(const char* path, pykd_model** model);
PYKD_API pykd_status pykd_model_load_bytes(const void* bytes, size_t size, pykd_model** model);
PYKD_API void pykd_model_free(pykd_model* model); /* null: nothing */

/* The sides of one row of the input or output, 1 to 4 of them: *sides points to *rank numbers that live as long as the
 * model. */
PYKD_API pykd_status pykd_model_input_shape(const pykd_model* model, const int64_t** sides, size_t* rank);
PYKD_API pykd_status pykd_model_output_shape(const pykd_model* model, const int64_t** sides, size_t* rank);

/* Names of the answers; there may be none. The name lives as long as the model and ends in a 0. */
PYKD_API pykd_status pykd_model_classes(const pykd_model* model, size_t* count);
PYKD_API pykd_status pykd_model_class(const pykd_model* model, size_t number, const char** name);

/* *takes is 1 where the file says how pixels of 0 to 255 are read, which pykd_plan_run_pixels needs, else 0. */
PYKD_API pykd_status pykd_model_takes_pixels(const pykd_model* model, int* takes);

typedef struct pykd_plan_options {
  size_t size;       /* sizeof(pykd_plan_options) */
  int64_t batch;     /* rows a run takes, 1 to 65,536 */
  int threads;       /* 1 to 256; CUDA does without */
  int measure;       /* 1: times the layers' forms on this machine; 0: a model of their costs decides */
  const char* cache; /* the file that remembers what was measured; null: none */
  int device;        /* a pykd_device: PYKD_CUDA is the first one that CUDA_VISIBLE_DEVICES lets through */
  int precision;     /* a pykd_precision: of what CUDA's tensor cores multiply; PYKD_FLOAT32 does without them */
} pykd_plan_options;

#define PYKD_PLAN_OPTIONS {sizeof(pykd_plan_options), 1, 1, 1, NULL, PYKD_CPU, PYKD_FLOAT32}

/* options: null for PYKD_PLAN_OPTIONS. Takes some milliseconds to a few seconds where it measures. On success *plan is
 * to be freed by pykd_plan_free, otherwise it is null. */
PYKD_API pykd_status pykd_plan_create(const pykd_model* model, const pykd_plan_options* options, pykd_plan** plan);
PYKD_API void pykd_plan_free(pykd_plan* plan); /* null: nothing */

/* input [batch, *input shape] to output [batch, *output shape], row-major, which may not overlap. The counts are those
 * of the numbers in them, and are checked. */
PYKD_API pykd_status pykd_plan_run(pykd_plan* plan, const float* input, size_t inputs, float* output, size_t outputs);
PYKD_API pykd_status pykd_plan_run_pixels(pykd_plan* plan, const uint8_t* pixels, size_t inputs, float* output,
                                          size_t outputs);

#ifdef __cplusplus
}
#endif

#endif
