// Answers one JSON line {ids} with one JSON line {seconds}: llama.cpp reads the ids one by one, with logits for each.
// usage: node llama_steps_worker.mjs MODEL.gguf THREADS CONTEXT
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";

const [path, threads, contextSize] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({
    contextSize: Number(contextSize), batchSize: 64, threads: {ideal: Number(threads), min: Number(threads)}
});
const sequence = context.getSequence();
console.log(JSON.stringify({ready: true}));

for await (const line of createInterface({input: process.stdin})) {
    const {ids} = JSON.parse(line);
    const before = sequence.nextTokenIndex;
    const started = performance.now();
    for (const id of ids) {
        // The token it answers with is dropped: each id is one step of decoding.
        for await (const token of sequence.evaluate([id], {temperature: 0, yieldEogToken: true})) {
            void token;
            break;
        }
    }
    const seconds = (performance.now() - started) / 1000;
    if (sequence.nextTokenIndex - before !== ids.length) throw new Error("a step read more than its token");
    console.log(JSON.stringify({seconds}));
}
