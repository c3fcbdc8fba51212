#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| tillcast_fuzz::run("answers", data));
