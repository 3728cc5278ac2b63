// Run a client's checks one by one and print a line for each: what run.sh makes its table of.
export const url = process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8080/v1";
export const model = process.env.CLIENTS_MODEL ?? "demo";
export const question = "Who was Ada Lovelace?";

export function must(condition, what) {
  if (!condition) throw new Error(what);
}

export async function run(client, checks) {
  let failed = 0;
  for (const [name, check] of Object.entries(checks)) {
    try {
      await check();
      console.log(`PASS ${client}: ${name}`);
    } catch (error) {
      failed = 1;
      console.error(error);
      console.log(`FAIL ${client}: ${name}: ${String(error).replaceAll(/\s+/g, " ").slice(0, 300)}`);
    }
  }
  process.exit(failed);
}
