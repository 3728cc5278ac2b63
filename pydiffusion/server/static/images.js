// Images for the next message: attached, pasted or dropped, shown small, removable. They are data URLs, kept
// in this page's memory only.
"use strict";

const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // of all others a JPEG or PNG is made
const LARGE_BYTES = 1 << 20; // of a file: smaller ones are sent as they are, whatever their sides
const LARGEST_BYTES = 64 << 20; // of a file that is read at all
// The server scales an image to at most 1120 soft tokens of 48 x 48 pixels, by default to 280. No picture is
// made smaller here than the largest of these, so that the server's scaling is still the last one.
const KEPT_PIXELS = 1120 * 48 * 48;
const JPEG_QUALITY = 0.95;

// Sides of at least KEPT_PIXELS in all. Of the pairs just above it the one that keeps the proportions best: the
// server rounds sides down, and another proportion could cost a row.
function scaledSides(width, height) {
  const [shorter, longer] = [Math.min(width, height), Math.max(width, height)];
  const from = Math.ceil(shorter * Math.sqrt(KEPT_PIXELS / (width * height)));
  let best = [shorter, longer];
  let least = Infinity;
  for (let a = from; a < Math.min(shorter, from + 48); a++) {
    const b = Math.ceil((a * longer) / shorter);
    const off = Math.abs((b * shorter) / (a * longer) - 1);
    if (off < least) [best, least] = [[a, b], off];
  }
  return width < height ? best : best.reverse();
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// As a data URL. Rotation by EXIF, and white behind what is transparent, are as the server has them; numbers are
// taken as the file has them, without its colour profile, as the server does too.
async function readImage(file) {
  if (file.size > LARGEST_BYTES) throw new Error(`it is larger than ${LARGEST_BYTES >> 20} MiB`);
  let picture;
  try {
    picture = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error("this browser can't read it as an image");
  }
  const known = SENT_AS_THEY_ARE.includes(file.type);
  const large = file.size > LARGE_BYTES && picture.width * picture.height > KEPT_PIXELS;
  if (known && !large) {
    picture.close();
    return dataUrl(file);
  }
  const [width, height] = large ? scaledSides(picture.width, picture.height) : [picture.width, picture.height];
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  picture.close();
  return dataUrl(await canvas.convertToBlob(large ? { type: "image/jpeg", quality: JPEG_QUALITY } : { type: "image/png" }));
}

function imageOf(item, className) {
  const shown = document.createElement("img");
  shown.src = item.url;
  shown.alt = item.name;
  shown.title = item.name;
  shown.className = className;
  return shown;
}

class Attachments {
  // list: where thumbnails are shown.  tell: called with what went wrong, or "".
  constructor(list, tell) {
    this.list = list;
    this.tell = tell;
    this.items = [];
    this.ready = Promise.resolve(); // when all that was added is read
  }

  add(files) {
    this.tell("");
    for (const file of files) this.ready = this.ready.then(() => this.read(file));
    return this.ready;
  }

  async read(file) {
    const name = file.name || "image";
    try {
      this.put([{ name, url: await readImage(file) }]);
    } catch (error) {
      this.tell(`${name} is not attached: ${error.message}.`);
    }
  }

  put(items) {
    this.items.push(...items);
    this.show();
  }

  // All of them, which are then no longer attached.
  take() {
    const taken = this.items;
    this.items = [];
    this.show();
    return taken;
  }

  show() {
    this.list.hidden = !this.items.length;
    this.list.replaceChildren(...this.items.map((item) => this.thumbnail(item)));
  }

  thumbnail(item) {
    const shown = document.createElement("li");
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "\u00d7";
    remove.setAttribute("aria-label", `Remove ${item.name}`);
    remove.addEventListener("click", () => {
      this.items = this.items.filter((other) => other !== item);
      this.show();
      document.getElementById("text").focus();
    });
    shown.append(imageOf(item, "thumbnail"), remove);
    return shown;
  }
}
