// The page: a chat whose answers come into focus. Text arrives only as text, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
const [log, form, text, send, stop, steps] = ["log", "form", "text", "send", "stop", "steps"].map(byId);

let messages = [];
let running = null; // the AbortController of the answer that is being made
let key = sessionStorage.getItem("key") || "";
let reads = null; // whether the model reads images; null until the server says so
const tell = (message) => { byId("notice").textContent = message; };
const attached = new Attachments(byId("attached"), tell);

function element(name, className, content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (content) made.textContent = content;
  return made;
}

function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// One answer: thinking, settled text, the canvas below it, and afterwards a slider over its steps.
class Answer {
  constructor() {
    this.root = element("article", "assistant");
    this.thoughts = element("details");
    this.thoughts.append(element("summary", "", "Thinking"), element("div", "thought"));
    this.thoughts.hidden = true;
    this.text = element("div", "answer");
    this.canvas = element("div", "canvas");
    this.canvas.setAttribute("aria-hidden", "true"); // drafts change all the time: only settled text is read out
    this.figures = element("div", "figures");
    this.root.append(this.thoughts, this.text, this.canvas, this.figures);
    log.append(this.root);
    this.frames = [];
    this.calls = [];
    this.content = "";
    this.reasoning = "";
  }

  draw(draft) {
    const spans = this.canvas.children;
    while (spans.length < draft.pieces.length) this.canvas.append(element("span"));
    draft.pieces.forEach((piece, i) => {
      const span = spans[i];
      if (span.textContent !== piece) span.textContent = piece;
      span.classList.toggle("settled", draft.settled[i] === 1);
      span.style.opacity = String(0.15 + 0.7 * Math.exp(-draft.entropy[i]));
    });
    this.canvas.hidden = false;
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.diffusion && event.diffusion.type === "draft") {
      this.frames.push(event.diffusion);
      this.draw(event.diffusion);
      this.figures.textContent = `canvas ${event.diffusion.canvas + 1}, step ${event.diffusion.step}`;
    }
    for (const choice of event.choices) {
      if (choice.delta) this.settle(choice.delta);
      else this.fill(choice);
    }
    if (event.diffusion && event.diffusion.type === "summary") this.finish(event.diffusion);
  }

  settle(delta) {
    if (delta.content) this.content += delta.content;
    if (delta.reasoning_content) this.reasoning += delta.reasoning_content;
    for (const call of delta.tool_calls || []) {
      this.calls.push(call);
      this.root.insertBefore(element("pre", "", `${call.function.name}(${call.function.arguments})`), this.canvas);
    }
    if (!delta.content && !delta.reasoning_content && !delta.tool_calls) return;
    this.text.textContent = this.content;
    this.thoughts.hidden = !this.reasoning;
    this.thoughts.lastChild.textContent = this.reasoning;
    this.canvas.hidden = true;
  }

  // A text whose holes are filled: what was put in stands out.
  fill(choice) {
    if (!choice.holes) return;
    this.content = choice.text;
    this.text.replaceChildren();
    let rest = choice.text;
    for (const [i, hole] of choice.holes.entries()) {
      const at = this.around[i].length;
      this.text.append(rest.slice(0, at), element("mark", "", hole));
      rest = rest.slice(at + hole.length);
    }
    this.text.append(rest);
    this.canvas.hidden = true;
  }

  finish(summary) {
    const seconds = summary.timings.total || 0;
    this.canvas.hidden = true;
    this.figures.textContent = `${summary.steps} steps, ${seconds.toFixed(1)} s, seed ${summary.seeds[0]}`;
    this.addReplay();
  }

  addReplay() {
    if (!this.frames.length) return;
    const label = element("label", "", "Replay ");
    const slider = element("input");
    slider.type = "range";
    slider.min = "0";
    slider.max = String(this.frames.length);
    slider.value = slider.max;
    const show = () => {
      const frame = this.frames[Number(slider.value)];
      this.text.hidden = Boolean(frame);
      if (frame) this.draw(frame);
      this.canvas.hidden = !frame;
      const where = frame ? `canvas ${frame.canvas + 1}, step ${frame.step}` : "the answer";
      slider.setAttribute("aria-valuetext", where);
    };
    slider.addEventListener("input", show);
    label.append(slider);
    const details = element("details", "entropy");
    details.append(element("summary", "", "Entropy by position and step"));
    details.append(heatMap(this.frames, (row) => {
      slider.value = String(row);
      show();
    }));
    this.figures.append(label);
    this.root.append(details);
  }

  note(message) {
    this.root.prepend(element("div", "figures", message));
  }

  fail(message) {
    this.canvas.hidden = true;
    const shown = element("div", "error", message);
    shown.setAttribute("role", "alert");
    this.root.append(shown);
  }
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

const maxBody = Number(document.querySelector("meta[name=max-body]").content);

async function post(path, body, signal) {
  const json = new Blob([JSON.stringify(body)]);
  if (json.size > maxBody) {
    const [size, most] = [json.size, maxBody].map((bytes) => (bytes / 1e6).toFixed(1));
    throw new Error(
      `This chat is ${size} MB with all its images, and the server takes ${most} MB (serve --max-body):`
        + " send fewer or smaller images, or begin a new chat.",
    );
  }
  const response = await fetch(path, { method: "POST", headers: headers(), body: json, signal });
  if (response.ok) return response;
  const { error } = await response.json();
  if (response.status === 401) askForKey().catch(() => {});
  throw new Error(error.message);
}

async function askForKey() {
  const given = prompt("This server asks for a key:");
  if (given === null) return;
  key = given;
  sessionStorage.setItem("key", key);
  await learn();
}

// Asks the server whether its model reads images, and for its adapters; without its key it does not say.
// Returns the status.
async function learn() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.ok) {
    const { data } = await response.json();
    reads = Boolean(data[0].vision);
    byId("attach").hidden = !reads;
    offerAdapters(data.filter((model) => model.lora));
  }
  return response.status;
}

// The values are a request's `lora`; of the first one, none, so that the server's scales count.
function offerAdapters(adapters) {
  const choice = byId("adapter");
  const options = adapters.map(({ id, lora }) => [id, JSON.stringify([{ id: lora.id, scale: lora.scale || 1 }])]);
  const all = [["The server's adapters", ""], ["No adapter", "[]"], ...options];
  choice.replaceChildren(...all.map(([name, value]) => new Option(name, value)));
  choice.hidden = !adapters.length;
}

async function attach(files) {
  const status = reads === null ? await learn().catch(() => 0) : 200;
  if (status === 401) await askForKey().catch(() => {});
  if (reads) await attached.add(files);
  else if (reads === false) tell("This model can't read images: it was loaded without a vision file (--mmproj FILE).");
  else tell(`The server didn't say whether its model reads images: it ${status === 401 ? "asks for a key" : "does not answer"}.`);
  text.focus();
}

function setRunning(controller) {
  running = controller;
  send.disabled = running !== null;
  stop.disabled = running === null;
}

// Sends a request and shows what comes; resolves with the answer.
async function run(path, body, answer) {
  setRunning(new AbortController());
  try {
    body = { ...body, stream: true, stream_options: { diffusion: true } };
    if (Number(steps.value)) body.steps = Number(steps.value);
    if (byId("adapter").value) body.lora = JSON.parse(byId("adapter").value);
    const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    for await (const event of eventsOf(await post(path, body, running.signal))) {
      const follow = atEnd();
      answer.take(event);
      if (follow) scrollDown();
    }
  } catch (error) {
    answer.fail(error.name === "AbortError" ? "Stopped." : error.message);
  }
  setRunning(null);
  text.focus();
}

// A message's content as OpenAI has it: a text, or the images before it as parts.
function contentOf(question, images) {
  if (!images.length) return question;
  const parts = images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
  return question ? [...parts, { type: "text", text: question }] : parts;
}

function textOf(content) {
  if (typeof content === "string") return content;
  return content.filter((part) => part.type === "text").map((part) => part.text).join("");
}

function scrollDown() {
  log.scrollTop = log.scrollHeight;
}

function showQuestion(question, images) {
  const shown = element("article", "user", question);
  if (images.length) {
    const pictures = element("div", "pictures");
    pictures.append(...images.map((image) => imageOf(image, "picture")));
    for (const picture of pictures.children) picture.addEventListener("load", scrollDown); // it has a height then
    shown.prepend(pictures);
  }
  log.append(shown);
  scrollDown();
}

async function ask(question, images) {
  const chat = messages; // "New chat" begins another one meanwhile
  chat.push({ role: "user", content: contentOf(question, images) });
  showQuestion(question, images);
  const answer = new Answer();
  const body = { messages: chat };
  if (byId("thinking").checked) body.enable_thinking = true;
  await run("v1/chat/completions", body, answer);
  if (answer.content) {
    chat.push({ role: "assistant", content: answer.content });
    return;
  }
  chat.pop(); // nothing was said: the question is not part of the chat, and can be sent again
  if (chat === messages && !text.value && !attached.items.length) {
    text.value = question;
    attached.put(images);
  }
}

const HOLE = /<\|hole(?::\d+)?\|>/;

// A text with holes: no part of the chat. A chat's last message, if there is one, is what it answers.
async function fillHoles(draft) {
  log.append(element("article", "user", draft));
  const answer = new Answer();
  answer.around = draft.split(HOLE);
  const asked = messages.filter((message) => message.role === "user").at(-1);
  const body = { text: draft, hole_tokens: Number(byId("hole-tokens").value) || 8 };
  if (asked) body.instruction = textOf(asked.content);
  if (asked && body.instruction !== asked.content) answer.note("The question's images don't count here: infill reads text.");
  await run("v1/infill", body, answer);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  await attached.ready;
  const question = text.value.trim();
  if ((!question && !attached.items.length) || running) return;
  if (byId("infill").checked) {
    if (attached.items.length) tell("Infill reads text only: remove the images, or send them with a question.");
    else fillHoles(question);
  } else {
    tell("");
    text.value = "";
    ask(question, attached.take());
  }
});

byId("attach").addEventListener("click", () => byId("files").click());

byId("files").addEventListener("change", () => {
  attach([...byId("files").files]);
  byId("files").value = ""; // or the same file could not be chosen again
});

// A copied table or text has its picture beside it: the text counts.
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length || event.clipboardData.types.includes("text/plain")) return;
  event.preventDefault();
  attach(files);
});

// Without this the browser would leave the page for the file.
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer || !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover" || kind === "dragenter");
    if (kind === "drop") attach([...event.dataTransfer.files]);
  });
}

text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

byId("infill").addEventListener("change", () => {
  byId("infill-tools").hidden = !byId("infill").checked;
  text.focus();
});

byId("hole").addEventListener("click", () => {
  text.setRangeText("<|hole|>", text.selectionStart, text.selectionEnd, "end");
  text.focus();
});

stop.addEventListener("click", () => running && running.abort());

steps.addEventListener("input", () => {
  byId("steps-shown").value = Number(steps.value) ? `at most ${steps.value}` : "the model's";
});

byId("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  log.replaceChildren();
  attached.ready.then(() => attached.take()); // those still being read too
  tell("");
  text.focus();
});

fetch("health").then((response) => response.json()).then((health) => {
  byId("model").textContent = health.model;
}).catch(() => {});

learn().catch(() => {});
