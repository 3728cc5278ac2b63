// The AI SDK, through its provider for OpenAI-compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { model as name, must, question as prompt, run, url } from "./checks.mjs";

const options = { name: "ours", baseURL: url, apiKey: "none" };
const model = createOpenAICompatible(options)(name);
const structured = createOpenAICompatible({ ...options, supportsStructuredOutputs: true })(name);
const schema = z.object({ name: z.string(), age: z.number().int() });
const tools = {
  person: tool({ description: "A person", inputSchema: schema, execute: async ({ name }) => `${name} is known` }),
  weather: tool({ description: "The weather", inputSchema: z.object({ city: z.string() }) }),
};

await run("AI SDK", {
  async generateText() {
    const { usage, finishReason } = await generateText({ model, prompt, maxOutputTokens: 32, temperature: 0.7 });
    must(usage.outputTokens > 0, "no usage");
    must(["stop", "length"].includes(finishReason), `finish reason ${finishReason}`);
  },
  async streamText() {
    const result = streamText({
      model: createOpenAICompatible({ ...options, includeUsage: true })(name), prompt, maxOutputTokens: 64,
      onError: ({ error }) => { throw error; },
    });
    for await (const _ of result.textStream);
    must((await result.usage).outputTokens > 0, "no usage");
    must(["stop", "length"].includes(await result.finishReason), `finish reason ${await result.finishReason}`);
  },
  async "toolChoice: required"() {
    const { toolCalls } = await generateText({ model, prompt, tools, toolChoice: "required" });
    must(toolCalls.length > 0, "no call");
    must(toolCalls.every((call) => !call.invalid), JSON.stringify(toolCalls));
  },
  async "toolChoice: a tool, its result, and an answer"() {
    const { steps } = await generateText({
      model, prompt, tools, toolChoice: { type: "tool", toolName: "person" }, stopWhen: stepCountIs(2),
    });
    must(steps[0].toolResults[0].output.endsWith("is known"), JSON.stringify(steps[0].toolResults));
  },
  async "toolChoice: required in a stream"() {
    const result = streamText({ model, prompt, tools, toolChoice: "required", onError: () => {} });
    const calls = await result.toolCalls;
    must(calls.length > 0 && calls.every((call) => !call.invalid), JSON.stringify(calls));
  },
  async generateObject() {
    schema.parse((await generateObject({ model: structured, prompt, schema })).object);
  },
  async "generateObject of an array"() {
    const { object } = await generateObject({ model: structured, prompt, schema, output: "array" });
    z.array(schema).parse(object);
  },
  async streamObject() {
    const { partialObjectStream, object } = streamObject({ model: structured, prompt, schema });
    for await (const _ of partialObjectStream);
    schema.parse(await object);
  },
  async "Output.object"() {
    schema.parse((await generateText({ model: structured, prompt, output: Output.object({ schema }) })).output);
  },
});
