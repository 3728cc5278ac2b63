// OpenAI's JavaScript client.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { model, must, question, run, url } from "./checks.mjs";

const client = new OpenAI({ baseURL: url, apiKey: "none" });
const messages = [{ role: "user", content: question }];
const Person = z.object({ name: z.string(), age: z.number().int() });
const tools = [zodFunction({ name: "person", parameters: Person })];

await run("openai (JavaScript)", {
  async chat() {
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 32 });
    must(answer.usage.completion_tokens > 0, "no usage");
  },
  async stream() {
    const stream = await client.chat.completions.create({
      model, messages, max_tokens: 64, stream: true, stream_options: { include_usage: true },
    });
    let usage, finish;
    for await (const part of stream) {
      usage = part.usage ?? usage;
      finish = part.choices[0]?.finish_reason ?? finish;
    }
    must(usage.completion_tokens > 0, "no usage");
    must(["stop", "length"].includes(finish), `finish reason ${finish}`);
  },
  async "tools required"() {
    const answer = await client.chat.completions.parse({ model, messages, tools, tool_choice: "required" });
    Person.parse(answer.choices[0].message.tool_calls[0].function.parsed_arguments);
  },
  async "tools required in a stream"() {
    const stream = client.chat.completions.stream({ model, messages, tools, tool_choice: "required" });
    const answer = await stream.finalChatCompletion();
    Person.parse(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments));
  },
  async parse() {
    const answer = await client.chat.completions.parse({
      model, messages, response_format: zodResponseFormat(Person, "person"),
    });
    Person.parse(answer.choices[0].message.parsed);
  },
  async completion() {
    const answer = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 32 });
    must(typeof answer.choices[0].text === "string", "no text");
  },
});
