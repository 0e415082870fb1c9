"use strict";
// What follows is progressive: without it every picture, number and text of the page is there already.
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const holder = $("#page-data");
const data = holder ? JSON.parse(holder.textContent) : null;

// Elements are only ever made of nodes and text: no string of the data becomes markup.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
};
// A sample without a score has null.
const signed = (value, column) => value === null ? "" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(column.digits);
const shownNumber = (value, column) => value === null ? "no score" : (value < 0 ? "−" : "") + Math.abs(value).toFixed(Math.max(3, column.digits));
const cardOf = id => document.getElementById("prompt-" + id);
const runOf = name => data.runs.find(run => run.name === name);
const runName = run => (data.runs.filter(other => other.arm === run.arm).length > 1 ? run.arm + ", seed " + run.seed : run.arm);
const firstRun = arm => data.runs.find(run => run.arm === arm);

// The samples of one prompt and run, by update; a picture that the card holds is taken from there.
const shotsOf = (id, name) => (data.prompts[id][name] || []).map(entry => {
  if (entry.p) return entry;
  const figure = $$("figure", cardOf(id)).find(item => item.dataset.run === name);
  const [picture, veil] = [$("img.plain, video.plain", figure), $("img.veil", figure)];
  const film = picture.tagName === "VIDEO";
  return {
    ...entry,
    p: film ? picture.getAttribute("poster") : picture.getAttribute("src"), v: veil && veil.getAttribute("src"),
    f: film ? picture.getAttribute("src") : null, m: film ? ($("video.mapped", figure) || picture).getAttribute("src") : null,
    w: film ? ($("video.mapped", figure) || picture).getAttribute("poster") : null,
  };
});
const finalOf = (id, name) => shotsOf(id, name).at(-1);
