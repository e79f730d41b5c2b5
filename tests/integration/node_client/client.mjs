// A client written from the .proto comments alone: speaks Generate and Session to a router, prints one JSON object.
//   node client.mjs HOST:PORT MODEL PROTO_ROOT
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, model, protoRoot] = process.argv.slice(2);
const definition = loader.loadSync("megatoken/v1/tokens.proto", { includeDirs: [protoRoot], enums: String, longs: Number });
const { Tokens } = grpc.loadPackageDefinition(definition).megatoken.v1;
const client = new Tokens(address, grpc.credentials.createInsecure());
const deadline = () => ({ deadline: Date.now() + 30_000 });

function generate(prompt, sampling) {
  return new Promise((resolve, reject) => {
    const tokens = [];
    let finish = null;
    const call = client.Generate({ model, prompt, sampling }, deadline());
    call.on("data", (message) => {
      tokens.push(...(message.tokens ?? []));
      if (message.finish) finish = message.finish;
    });
    call.on("end", () => resolve({ tokens, finish }));
    call.on("error", reject);
  });
}

function refused(prompt, sampling) {
  return generate(prompt, sampling).then(
    () => ({ code: grpc.status.OK, details: "" }),
    (error) => ({ code: error.code, details: error.details }),
  );
}

function session(prompts, sampling) {
  return new Promise((resolve, reject) => {
    const streams = prompts.map(() => ({ tokens: [], finish: null }));
    const call = client.Session(deadline());
    let running = prompts.length;
    call.on("data", (frame) => {
      let next = 0;
      (frame.stream ?? []).forEach((stream, entry) => {
        const count = frame.count?.length ? frame.count[entry] : 1;
        streams[stream - 1].tokens.push(...frame.token.slice(next, next + count));
        next += count;
      });
      for (const finish of frame.finish ?? []) {
        streams[finish.stream - 1].finish = finish;
        running -= 1;
        if (running === 0) call.end();
      }
    });
    call.on("end", () => resolve(streams));
    call.on("error", reject);
    call.write({ start: prompts.map((prompt, i) => ({ stream: i + 1, request: { model, prompt, sampling } })) });
  });
}

const sampling = { maxTokens: 16, ignoreEos: true, temperature: 0 };
const prompts = [[1, 2, 3], [4, 5], [6]];
const single = await generate(prompts[0], sampling);
const many = await session(prompts, sampling);
const negative = await refused([1, 2, 3], { ...sampling, temperature: -1 });
console.log(JSON.stringify({ single, many, negative }));
client.close();
