// Logits of every position of a text by llama.cpp, fp32 in token order, one after another in a file.
// usage: node llama_logits.mjs MODEL.gguf IDS.json OUT.bin, where node_modules holds node-llama-cpp
import {closeSync, openSync, readFileSync, writeSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const [path, idsPath, out] = process.argv.slice(2);
const ids = JSON.parse(readFileSync(idsPath, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: path});
// A cache in fp32: what remains is the rounding of weights and of the activations that meet them.
const context = await model.createContext({
    contextSize: ids.length + 16, batchSize: 512, flashAttention: false, threads: 1,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
const file = openSync(out, "w");
const STEP = 32;
for (let start = 0; start < ids.length; start += STEP) {
    const piece = ids.slice(start, start + STEP).map((token) => [token, {generateNext: {logits: true}}]);
    for (const result of await sequence.controlledEvaluate(piece)) {
        const row = new Float32Array(result.next.logits.size);
        for (const [token, logit] of result.next.logits) row[token] = logit;
        writeSync(file, row);
    }
}
closeSync(file);
await llama.dispose();
