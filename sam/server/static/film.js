// A video: its frames go to a session of the service one by one, and the masks that come back are played.
// A session remembers no frame that went by, so only the newest one can be clicked on.

import { COLORS, show } from "./masks.js";

const RATE = 10; // pictures a second that are taken from a video file: browsers do not tell its own rate
const LONGEST_SIDE = 1280, QUALITY = 0.92;
const PLAY_MS = 100, PING_MS = 30000;

/** Return the frames of chosen files, a video or pictures in the order of their names; null of a single picture. */
export function framesOf(files) {
  const videos = files.filter(({ type }) => type.startsWith("video/"));
  if (videos.length) return ofVideo(videos[0]);
  if (files.length < 2) return null;
  const sorted = [...files].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return { name: sorted[0].name, count: sorted.length, open: async () => sorted.length, at: async (n) => sorted[n], close() {} };
}

function ofVideo(file) {
  const player = Object.assign(document.createElement("video"), { muted: true, playsInline: true, preload: "auto" });
  const happened = (name) => new Promise((resolve, reject) => {
    player.addEventListener(name, resolve, { once: true });
    player.addEventListener("error", () => reject(new Error("This video is not one that the browser can show.")), { once: true });
  });
  return {
    name: file.name,
    async open() {
      const ready = happened("loadeddata");
      player.src = URL.createObjectURL(file);
      await ready;
      return Math.max(1, Math.floor(player.duration * RATE));
    },
    async at(n) {
      const there = happened("seeked");
      player.currentTime = (n + 0.5) / RATE;
      await there;
      const scale = Math.min(1, LONGEST_SIDE / Math.max(player.videoWidth, player.videoHeight));
      const canvas = new OffscreenCanvas(Math.round(player.videoWidth * scale), Math.round(player.videoHeight * scale));
      canvas.getContext("2d").drawImage(player, 0, 0, canvas.width, canvas.height);
      return canvas.convertToBlob({ type: "image/jpeg", quality: QUALITY });
    },
    close: () => URL.revokeObjectURL(player.src),
  };
}

export class Film {
  /** `page` has the canvas `photo`, and call(path, body, method), say(text), attempt(work), refresh(). */
  constructor(source, page) {
    Object.assign(this, { source, page, name: source.name.replace(/\.[^.]*$/, "") });
    this.frames = []; // {blob, answer, prompts: {object: {points, labels, box}}}
    [this.shown, this.count, this.session, this.playing, this.tracking] = [0, 0, null, null, false];
    [this.objects, this.object] = [1, 1]; // how many there are, and the one that clicks are about
  }

  /** Open a session and send the first frame; returns {width, height} of it. */
  async open() {
    this.count = await this.source.open();
    this.session = (await this.page.call("v1/video/sessions", {})).session;
    this.pinging = setInterval(() => fetch(this.path()).catch(() => {}), PING_MS);
    await this.push();
    return this.frames[0].answer.image;
  }

  path = (step = "") => `v1/video/sessions/${this.session}${step}`;

  close() {
    this.stop();
    this.tracking = false;
    clearInterval(this.pinging);
    this.source.close();
    if (this.session) fetch(this.path(), { method: "DELETE", keepalive: true }).catch(() => {});
    this.session = null;
  }

  async push() {
    const index = this.frames.length, form = new FormData();
    const blob = await this.source.at(index);
    form.append("image", blob);
    form.append("frame", index);
    const answer = await this.page.call(this.path("/frames"), form);
    this.frames.push({ blob, answer, prompts: {} });
    await this.seek(index);
  }

  get newest() { return this.frames.length - 1; }
  get ended() { return this.frames.length >= this.count; }
  get frame() { return this.frames[this.shown] ?? null; }
  /** Clicks and box of the chosen object on the frame that is shown. */
  get prompt() { return this.frame?.prompts[this.object] ?? null; }

  masks() {
    const objects = this.frame?.answer.objects ?? [];
    return objects.map((mask) => ({ ...mask, color: COLORS[(mask.id - 1) % COLORS.length] }));
  }

  async seek(index) {
    if (!this.frames[index]) return;
    this.shown = index;
    const bitmap = await createImageBitmap(this.frames[index].blob, { imageOrientation: "from-image" });
    if (this.shown === index) show(this.page.photo, bitmap); // a later one may have come first
    bitmap.close();
    this.page.refresh();
  }

  /** Prompt the chosen object on the newest frame: clicks join earlier ones, a box stands for all of them. */
  ask = (prompt) => this.page.attempt(async () => {
    if (this.tracking) return;
    this.stop();
    if (this.shown !== this.newest) {
      await this.seek(this.newest);
      this.page.say("Frames that went by cannot be changed; this is the newest. Click again.");
      return;
    }
    const { prompts } = this.frame, before = prompts[this.object];
    const question = { prompts: [{ object: String(this.object), ...prompt }] };
    this.frame.answer = await this.page.call(this.path("/prompts"), question);
    prompts[this.object] = prompt.box ? prompt : {
      box: before?.box,
      points: [...(before?.points ?? []), ...prompt.points],
      labels: [...(before?.labels ?? []), ...prompt.labels],
    };
    this.page.say(this.describe());
  });

  describe() {
    const mask = this.masks().find(({ id }) => Number(id) === this.object);
    const there = mask ? `object ${this.object}: ${mask.area.toLocaleString("en")} px${mask.object_score > 0 ? "" : ", not seen"}` : "click on an object";
    return `Frame ${this.shown + 1} of ${this.count}, ${there}`;
  }

  /** Forget the chosen object. */
  forget = () => this.page.attempt(async () => {
    if (this.tracking || !this.masks().some(({ id }) => Number(id) === this.object)) return;
    const answer = await this.page.call(this.path("/remove"), { object: String(this.object) });
    this.frames[this.newest].answer = answer;
    delete this.frames[this.newest].prompts[this.object];
    await this.seek(this.newest);
    this.page.say(this.describe());
  });

  choose(object) {
    this.object = object;
    this.objects = Math.max(this.objects, object);
    this.page.refresh();
  }

  /** Send one frame after the other, until the last or until this is called again. */
  track = () => this.page.attempt(async () => {
    if (this.tracking || this.ended) {
      this.tracking = false;
      return;
    }
    this.stop();
    this.tracking = true;
    try {
      while (this.tracking && !this.ended) {
        await this.push();
        this.page.say(`Tracking … frame ${this.frames.length} of ${this.count}`);
      }
    } finally {
      this.tracking = false;
    }
    this.page.say(this.ended ? `${this.count} frames tracked. Play them.` : this.describe());
  });

  play = () => {
    if (this.playing) return this.stop();
    if (this.shown === this.newest) this.shown = -1;
    this.playing = setInterval(() => {
      if (this.shown < this.newest) this.seek(this.shown + 1);
      else this.stop();
    }, PLAY_MS);
    this.page.refresh();
  };

  stop() {
    clearInterval(this.playing);
    this.playing = null;
    this.page.refresh();
  }

  json() {
    return { frames: this.frames.map(({ answer, prompts }) => ({ ...answer, prompts })) };
  }
}
