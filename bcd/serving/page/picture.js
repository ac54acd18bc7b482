// Images in the browser: decoded, shrunk, and with evidence drawn over them exactly as in bcd/reports/overlay.py.

// Longest side of drawn images: as fine as a screen, and fast enough to follow the slider.
const LARGEST_PX = 1280;

/** The image as a bitmap, or null where this browser cannot read the format (TIFF) or the file is damaged. */
export async function decode(blob) {
  try {
    // In sRGB, as the model reads it: the browser applies a colour profile too.
    return await createImageBitmap(blob);
  } catch {
    return null;
  }
}

/** The pixels of a bitmap, shrunk to a size, over white where it is transparent. */
export function pixelsOf(bitmap, side = LARGEST_PX) {
  const shrink = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * shrink));
  canvas.height = Math.max(1, Math.round(bitmap.height * shrink));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** Cells and weights of each of `count` pixels: Pillow's bilinear filter over a box. */
function shares(cells, from, to, count) {
  const step = (to - from) / count;
  const reach = Math.max(1, step);
  return Array.from({ length: count }, (_, i) => {
    const centre = from + (i + 0.5) * step;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(cells, Math.trunc(centre + reach + 0.5));
    const raw = [];
    for (let cell = first; cell < last; cell++) {
      raw.push(Math.max(0, 1 - Math.abs((cell - centre + 0.5) / reach)));
    }
    const total = raw.reduce((sum, value) => sum + value, 0);
    return { first, values: raw.map((value) => value / total) };
  });
}

function blend(row, { first, values }) {
  return values.reduce((sum, share, k) => sum + share * row[first + k], 0);
}

/** Evidence over an image, Float32Array in -1 ... 1: the part of the map that covers it, enlarged. */
export function strengthsOf(evidence, limit, width, height) {
  const { covers, values } = evidence;
  const across = shares(evidence.width, covers.left * evidence.width, covers.right * evidence.width, width);
  const down = shares(evidence.height, covers.top * evidence.height, covers.bottom * evidence.height, height);
  const wide = values.map((row) => across.map((share) => blend(row, share)));
  const result = new Float32Array(width * height);
  down.forEach(({ first, values: weights }, y) => {
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * wide[first + k][x];
      result[y * width + x] = Math.min(1, Math.max(-1, sum / limit));
    }
  });
  return result;
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** Pixels under their evidence; `scale` is `overlay` of /v1/model, `opacity` is 0 ... 1. */
export function laidOver(pixels, strengths, scale, opacity) {
  const [against, towards] = [rgb(scale.against_colour), rgb(scale.towards_colour)];
  const result = new ImageData(pixels.width, pixels.height);
  const [from, to] = [pixels.data, result.data];
  for (let i = 0, at = 0; i < strengths.length; i++, at += 4) {
    // Pillow's conversion to grey, in integers.
    const grey = (from[at] * 19595 + from[at + 1] * 38470 + from[at + 2] * 7471 + 32768) >> 16;
    const light = 1 - scale.contrast * (1 - grey / 255);
    const colour = strengths[i] < 0 ? against : towards;
    const alpha = opacity * Math.abs(strengths[i]);
    for (let c = 0; c < 3; c++) to[at + c] = from[at + c] * (1 - alpha) + light * colour[c] * alpha;
    to[at + 3] = 255;
  }
  return result;
}

/** Draw pixels on a canvas of their size. */
export function draw(canvas, pixels) {
  // Setting a size clears the canvas: set it only where it changes, so that the slider does not flicker.
  if (canvas.width !== pixels.width) canvas.width = pixels.width;
  if (canvas.height !== pixels.height) canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** The scale's colours from -limit to +limit over white paper. */
export function drawLegend(canvas, scale, opacity) {
  const width = canvas.width;
  const paper = new ImageData(new Uint8ClampedArray(4 * width).fill(255), width, 1);
  const ramp = Float32Array.from({ length: width }, (_, i) => (2 * i) / (width - 1) - 1);
  draw(canvas, laidOver(paper, ramp, scale, opacity));
}

/** PNG in base64 as a blob; fetch("data:...") would require a wider content policy. */
export function pngOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}
