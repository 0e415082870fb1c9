"""Random checkpoints of the families whose prompts a language model reads, in the smallest size."""

import string
from pathlib import Path

import torch
from checkpoints import picture_autoencoder
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer(*marks: str) -> Qwen2Tokenizer:
    """One token a byte, and one for each of `marks`; and a chat template as Qwen3 has it."""
    vocab = {letter: row for row, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=_CHAT, model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    return tokenizer


def _qwen3(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def write_z_image(folder: Path) -> Path:
    """Z-Image: pictures with sides in multiples of 4."""
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    for token in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(token)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=picture_autoencoder(shift=0.12),
        text_encoder=Qwen3Model(_qwen3(2)),
        tokenizer=qwen_tokenizer(),
        transformer=network,
    ).save_pretrained(folder)
    return folder


def _flux2_network(width: int, guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def _flux2_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    generator = torch.Generator().manual_seed(1)
    vae.bn.running_mean.copy_(torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(1 + torch.rand(16, generator=generator))
    return vae


def write_flux2_klein(folder: Path, distilled: bool = False) -> Path:
    """FLUX.2 klein: sides in multiples of 4, levels shifted by the number of tokens and of steps."""
    torch.manual_seed(0)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_flux2_autoencoder(),
        # The pipeline reads layers 9, 18 and 27.
        text_encoder=Qwen3ForCausalLM(_qwen3(28)),
        tokenizer=qwen_tokenizer(),
        transformer=_flux2_network(48, guidance=False),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def pixtral_processor() -> PixtralProcessor:
    """One token a byte, with the marks of Mistral 3's conversations."""
    marks = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    pieces = ("<unk>", "<s>", "</s>", "<pad>", *marks, *sorted(ByteLevel.alphabet()))
    backend = Tokenizer(BPE({piece: row for row, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
        "[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]{% else %}"
        "[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(marks),
        chat_template=template,
    )
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(), tokenizer=tokenizer, patch_size=2, chat_template=template
    )


def write_flux2_dev(folder: Path) -> Path:
    """FLUX.2-dev: guidance embedded."""
    torch.manual_seed(0)
    text = {
        "model_type": "mistral",
        "vocab_size": 272,
        "hidden_size": 16,
        "intermediate_size": 16,
        # The pipeline reads layers 10, 20 and 30.
        "num_hidden_layers": 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_flux2_autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=pixtral_processor(),
        transformer=_flux2_network(48, guidance=True),
    ).save_pretrained(folder)
    return folder


def write_sana(folder: Path) -> Path:
    """Sana: pictures with even sides."""
    torch.manual_seed(0)
    pieces = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable.replace(" ", ""))
    blocks = {"block_types": "ResBlock", "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
    both = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    SanaPipeline(
        tokenizer=GemmaTokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[]),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=112,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            **both,
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder
