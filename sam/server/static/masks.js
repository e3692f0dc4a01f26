// Masks as the service sends them, and how they are painted.

// Okabe and Ito's colours, distinct to colour-blind eyes too.
export const COLORS = [
  [86, 180, 233], [230, 159, 0], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167],
];
const LONGEST_OVERLAY = 1600; // pixels; masks of larger images are drawn from every second, third, ... pixel

/** COCO's compressed run lengths -> one byte a pixel, row by row, of every `stride`-th pixel. */
export function decode({ size: [height, width], counts }, stride = 1) {
  const runs = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, code;
    do {
      code = counts.charCodeAt(at++) - 48;
      value += (code & 31) * 2 ** shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value -= 2 ** shift;
    runs.push(runs.length > 2 ? value + runs.at(-2) : value);
  }
  const [columns, rows] = [Math.ceil(width / stride), Math.ceil(height / stride)];
  const pixels = new Uint8Array(columns * rows);
  let position = 0;
  runs.forEach((run, index) => {
    if (index % 2) {
      for (let p = position; p < position + run; p++) {
        const x = Math.floor(p / height), y = p % height;
        if (x % stride === 0 && y % stride === 0) pixels[(y / stride) * columns + x / stride] = 1;
      }
    }
    position += run;
  });
  return { pixels, columns, rows };
}

/** Paint masks [{segmentation, color}] of an image of these sides on a canvas, later ones over earlier ones. */
export function paint(canvas, width, height, masks) {
  const stride = Math.max(1, Math.ceil(Math.max(width, height) / LONGEST_OVERLAY));
  const [columns, rows] = [Math.ceil(width / stride), Math.ceil(height / stride)];
  [canvas.width, canvas.height] = [columns, rows];
  const picture = new ImageData(columns, rows);
  for (const { segmentation, color } of masks) {
    const { pixels } = decode(segmentation, stride);
    for (let p = 0; p < pixels.length; p++) {
      if (!pixels[p]) continue;
      const x = p % columns;
      const edge = (x > 0 && !pixels[p - 1]) || (x < columns - 1 && !pixels[p + 1]) ||
        (p >= columns && !pixels[p - columns]) || (p < pixels.length - columns && !pixels[p + columns]);
      picture.data.set([...color, edge ? 255 : 125], 4 * p);
    }
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

/** Draw a picture on a canvas, not much larger than an overlay. */
export function show(canvas, bitmap) {
  const scale = Math.min(1, 2 * LONGEST_OVERLAY / Math.max(bitmap.width, bitmap.height));
  [canvas.width, canvas.height] = [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}
