// Answers one JSON line with one JSON line: llama.cpp behind the same small protocol as bench_cpu.py's own engine.
// usage: node llama_worker.mjs MODEL.gguf THREADS CONTEXT
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";

const [path, threads, contextSize] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({
    contextSize: Number(contextSize), batchSize: 512, threads: {ideal: Number(threads), min: Number(threads)}
});
const sequence = context.getSequence();
console.log(JSON.stringify({ready: true}));

for await (const line of createInterface({input: process.stdin})) {
    const {ids, tokens} = JSON.parse(line);
    await sequence.clearHistory();
    const started = performance.now();
    let first = null;
    let last = null;
    const produced = [];
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        last = performance.now();
        first ??= last;
        produced.push(token);
        if (produced.length >= tokens) break;
    }
    console.log(JSON.stringify({
        prefill_s: (first - started) / 1000, decode_s: (last - first) / 1000, produced
    }));
}
