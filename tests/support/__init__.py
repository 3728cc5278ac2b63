"""What several test files share: fake models, servers, broken files, comparisons."""
