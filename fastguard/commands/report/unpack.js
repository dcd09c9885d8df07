"use strict";

// Decodes what packing.py encodes: LZMA in base 91. The decoder follows the LZMA specification (Igor Pavlov, public
// domain). Unpacking the plotting library takes about 0.3 s on a desktop computer.

// Each pair of characters holds 13 bits. The digits are the printable ASCII characters except < > &.
function fromBase91(text) {
  const digits = new Uint8Array(128);
  for (let code = 33, digit = 0; code < 127; code++) {
    if (!"<>&".includes(String.fromCharCode(code))) digits[code] = digit++;
  }
  const bytes = new Uint8Array(Math.floor((text.length / 2) * 13 / 8));
  let bits = 0, held = 0, n = 0;
  for (let i = 0; i < text.length; i += 2) {
    bits = (bits << 13) | (91 * digits[text.charCodeAt(i)] + digits[text.charCodeAt(i + 1)]);
    for (held += 13; held >= 8; held -= 8) bytes[n++] = bits >>> (held - 8);
    bits &= 255;  // fewer than 8 bits are left
  }
  return bytes;
}

// Decodes a .lzma file whose contents are `size` bytes long.
function fromLzma(input, size) {
  const literalBits = input[0] % 9, lowBits = Math.floor(input[0] / 9) % 5, alignBits = Math.floor(input[0] / 45);
  const output = new Uint8Array(size);
  let next = 18, range = 0xffffffff;
  let code = new DataView(input.buffer).getUint32(14);  // after the header of 13 bytes and a zero

  const models = (n) => new Uint16Array(n).fill(1024);  // the probability of a 0, in units of 1/2048

  function bit(model, i) {
    const p = model[i], bound = (range >>> 11) * p, one = code >= bound ? 1 : 0;
    if (one) {
      range -= bound;
      code -= bound;
      model[i] = p - (p >> 5);
    } else {
      range = bound;
      model[i] = p + ((2048 - p) >> 5);
    }
    refill();
    return one;
  }

  function refill() {
    if (range >= 0x1000000) return;
    range = (range << 8) >>> 0;
    code = ((code << 8) | input[next++]) >>> 0;
  }

  // A number of n bits, the highest first. Its models begin at index `from`.
  function number(model, from, n) {
    let node = 1;
    for (let i = 0; i < n; i++) node = (node << 1) | bit(model, from + node);
    return node - (1 << n);
  }

  // A number of n bits, the lowest first.
  function reversed(model, from, n) {
    let node = 1, value = 0;
    for (let i = 0; i < n; i++) {
      const one = bit(model, from + node);
      node = (node << 1) | one;
      value |= one << i;
    }
    return value;
  }

  // A number of n bits that are equally likely.
  function uniform(n) {
    let value = 0;
    for (let i = 0; i < n; i++) {
      range >>>= 1;
      const one = code >= range ? 1 : 0;
      if (one) code -= range;
      value = (value << 1) | one;
      refill();
    }
    return value;
  }

  const lengths = () => ({ choice: models(2), short: models(16 << 3), middle: models(16 << 3), long: models(256) });

  function lengthOf({ choice, short, middle, long }, position) {
    if (!bit(choice, 0)) return 2 + number(short, position << 3, 3);
    if (!bit(choice, 1)) return 10 + number(middle, position << 3, 3);
    return 18 + number(long, 0, 8);
  }

  const slots = models(4 << 6), middle = models(128), lowest = models(16);

  function distanceOf(length) {
    const slot = number(slots, Math.min(length - 2, 3) << 6, 6);
    if (slot < 4) return slot;
    const n = (slot >> 1) - 1, high = (2 | (slot & 1)) << n;
    if (slot < 14) return high + reversed(middle, high - slot, n);
    return high + (uniform(n - 4) << 4) + reversed(lowest, 0, 4);
  }

  const literals = models(0x300 << (literalBits + lowBits));

  function literal(at, guess) {
    const before = at > 0 ? output[at - 1] : 0;
    const context = ((at & ((1 << lowBits) - 1)) << literalBits) + (before >> (8 - literalBits));
    const from = 0x300 * context;
    let node = 1;
    for (let same = guess !== null; same && node < 256; guess <<= 1) {
      const expected = (guess >> 7) & 1, one = bit(literals, from + ((1 + expected) << 8) + node);
      node = (node << 1) | one;
      same = one === expected;
    }
    while (node < 256) node = (node << 1) | bit(literals, from + node);
    return node;
  }

  const isMatch = models(12 << 4), isRepeated = models(12), isLonger = models(12 << 4);
  const isOlder = [models(12), models(12), models(12)];  // the second, third and fourth latest distance
  const matchLengths = lengths(), repeatedLengths = lengths();
  const distances = [0, 0, 0, 0];  // the latest first; 0 is the byte before
  let state = 0;  // what the latest operations were; from 7 on, the last one was a match
  for (let at = 0; at < size;) {
    const position = at & ((1 << alignBits) - 1);
    if (!bit(isMatch, (state << 4) + position)) {
      output[at] = literal(at, state >= 7 ? output[at - distances[0] - 1] : null);
      state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
      at++;
      continue;
    }
    const followsLiteral = state < 7;
    let length;
    if (!bit(isRepeated, state)) {
      length = lengthOf(matchLengths, position);
      distances.pop();
      distances.unshift(distanceOf(length));
      state = followsLiteral ? 7 : 10;
    } else {
      let age = 0;
      while (age < 3 && bit(isOlder[age], state)) age++;
      if (age === 0 && !bit(isLonger, (state << 4) + position)) {
        length = 1;
        state = followsLiteral ? 9 : 11;
      } else {
        distances.unshift(...distances.splice(age, 1));
        length = lengthOf(repeatedLengths, position);
        state = followsLiteral ? 8 : 11;
      }
    }
    for (const end = Math.min(at + length, size), back = distances[0] + 1; at < end; at++) output[at] = output[at - back];
  }
  return output;
}

function unpacked(element) {
  const bytes = fromLzma(fromBase91(element.textContent), Number(element.dataset.size));
  return new TextDecoder().decode(bytes);
}
