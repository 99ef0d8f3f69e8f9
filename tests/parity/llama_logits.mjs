// llama.cpp's greedy tokens and the logits that chose them: one JSON line in, one JSON line out.
// usage: node llama_logits.mjs MODEL.gguf CONTEXT, where node_modules holds node-llama-cpp
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";

const [path, contextSize] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: path});
// fp32 throughout: the default cache is fp16, and flash attention rounds too.
const context = await model.createContext({
    contextSize: Number(contextSize), batchSize: 512, flashAttention: false, threads: 1,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
console.log(JSON.stringify({ready: true, release: llama.llamaCppRelease.release}));

async function logitsAfter(tokens) {
    const last = tokens.length - 1;
    const input = tokens.map((token, index) => index < last ? token : [token, {generateNext: {logits: true}}]);
    const results = await sequence.controlledEvaluate(input);
    return results[last].next.logits;
}

for await (const line of createInterface({input: process.stdin})) {
    // `forced`: tokens to follow instead of the greedy ones.
    const {ids, count, forced} = JSON.parse(line);
    await sequence.clearHistory();
    const tokens = [];
    const logits = [];
    for (let pending = ids; tokens.length < count; pending = [tokens.at(-1)]) {
        const found = await logitsAfter(pending);
        const row = new Array(found.size);
        let best = null;
        for (const [token, logit] of found) {
            row[token] = logit;
            best ??= token;
        }
        logits.push(row);
        tokens.push(forced ? forced[tokens.length] : best);
    }
    console.log(JSON.stringify({tokens, logits}));
}
await llama.dispose();
